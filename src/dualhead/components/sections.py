"""Base of the sections of a recipe: pydantic models that refuse unknown keys and hold components."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, model_validator

from dualhead.components.registry import Registry
from dualhead.errors import UserError


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    @model_validator(mode="before")
    @classmethod
    def _keys_are_known(cls, content: Any) -> Any:
        if isinstance(content, cls):
            return content
        if not isinstance(content, Mapping):
            raise UserError(f": must hold the keys {', '.join(cls.model_fields)}; got {content!r}")
        for key in content:
            if key not in cls.model_fields:
                near = get_close_matches(str(key), cls.model_fields, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise UserError(f".{key}: unknown key{hint} (known: {', '.join(cls.model_fields)})")
        return content


def component(registry: Registry[Any]) -> tuple[BeforeValidator, PlainSerializer]:
    """Annotations of a field that holds a component: read from a recipe, and written back in the long form."""
    # A leading "." in a message lets `first_error` join the component's own key to its place in the recipe.
    return BeforeValidator(lambda spec: registry.build(spec, where=".")), PlainSerializer(registry.describe)
