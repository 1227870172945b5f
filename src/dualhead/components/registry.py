"""Components by name: a frozen dataclass, registered in its own file, is its own schema in a recipe.

    @objectives.register("trades")
    @dataclass(frozen=True)
    class Trades(Objective):
        beta: float = 6.0

is then found by `trades` and `{name: trades, beta: 3}`. To add a component is to add one file to its folder.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, Generic, TypeVar, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError

from dualhead.errors import UserError

T = TypeVar("T")
C = TypeVar("C", bound=type)


def _join(where: str, *keys: object) -> str:
    for key in keys:
        where = f"{where.rstrip('.')}.{key}" if where else str(key)
    return where


def first_error(error: ValidationError, where: str = "") -> str:
    """The first complaint of a validation as one line: where, what, and the value found.

    A component inside a larger recipe is built with `where="."`: its complaints then start with "." or ":", and join
    the place that the recipe knows.
    """
    detail = error.errors()[0]
    place = _join(where, *detail["loc"]).removesuffix(".")
    message = detail["msg"].removeprefix("Value error, ")
    if message.startswith((".", ": ")):
        return place + message if place or where == "." else message.lstrip(".: ")
    if detail["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{place}: unknown key"
    if detail["type"] in ("missing", "missing_argument"):
        return f"{place}: missing; this key is required"
    given = detail["input"]
    if detail["type"] == "value_error":  # our own words
        shown = ""
    else:  # pydantic's, which do not know that in a recipe a tuple is a list
        message = (message[0].lower() + message[1:]).replace("tuple", "list")
        plain = given is None or (isinstance(given, str | int | float | bool) and repr(given) not in message)
        shown = f" (got {'nothing' if given is None else repr(given)})" if plain else ""
    return f"{place}: {message}{shown}" if where or place else message + shown


class Registry(Generic[T]):
    """Components of one kind.

    Args:
        kind: what the components are, for messages: `"objective"`.
        package: the folder whose modules register them, or one module; imported at the first look-up.
        imported_as: name of the component that stands for `package.module:factory`, if the kind has one.
    """

    def __init__(self, kind: str, package: str, *, imported_as: str | None = None) -> None:
        self.kind = kind
        self._package = package
        self._imported_as = imported_as
        self._classes: dict[str, type] = {}
        self._loaded = False

    def register(self, name: str, *, numbers: tuple[str, ...] = (), text: str | None = None) -> Callable[[C], C]:
        """Register a frozen dataclass.

        Args:
            name: how recipes call it.
            numbers: fields that a short form sets in order: with `("steps",)`, `pgd-40` is `{name: pgd, steps: 40}`.
            text: the field that what follows a colon sets: with `"model"`, `timm:resnet18` is
                `{name: timm, model: resnet18}`.
        """

        def decorate(cls: C) -> C:
            if not dataclasses.is_dataclass(cls):
                raise TypeError(f"{cls.__name__} must be a dataclass to be registered as {self.kind} {name!r}")
            if self._classes.get(name, cls).__qualname__ != cls.__qualname__:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            described = cast("Any", cls)
            described.__pydantic_config__ = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
            described.registered_name = name
            described.short_numbers = numbers
            described.short_text = text
            self._classes[name] = cls
            return cls

        return decorate

    def _load(self) -> None:
        if not self._loaded:
            self._loaded = True
            package = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(getattr(package, "__path__", ())):
                importlib.import_module(f"{self._package}.{module.name}")

    def names(self) -> list[str]:
        """All registered names, sorted."""
        self._load()
        return sorted(self._classes)

    def get(self, name: str) -> type[T]:
        """The class registered under a name.

        Raises:
            UserError: naming the nearest known names, if there is none.
        """
        self._load()
        if name not in self._classes:
            near = get_close_matches(name, self._classes, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(f"unknown {self.kind} {name!r}; {hint}known: {', '.join(self.names())}")
        return cast("type[T]", self._classes[name])

    def expand(self, spec: str | Mapping[str, Any]) -> dict[str, Any]:
        """A spec in its long form: `pgd-40` becomes `{"name": "pgd", "steps": 40}`.

        Raises:
            UserError: if the name is unknown or the short form does not fit it.
        """
        self._load()
        if not isinstance(spec, str):
            if "name" not in spec:
                raise UserError(f"{self.kind} needs a name, {{name: ...}}; known: {', '.join(self.names())}")
            return {**self.expand(str(spec["name"])), **{k: v for k, v in spec.items() if k != "name"}}
        if spec in self._classes:
            return {"name": spec}
        head, colon, tail = spec.partition(":")
        if colon:
            field = getattr(self._classes.get(head), "short_text", None)
            if field is None and self._imported_as is not None and head not in self._classes:
                head, tail = self._imported_as, spec
                field = getattr(self._classes[head], "short_text", None)
            if field is not None:
                return {"name": head, field: tail}
        words = spec.split("-")
        prefixes = ["-".join(words[:count]) for count in range(len(words), 0, -1)]
        name = next(
            (prefix for prefix in prefixes if prefix in self._classes), spec
        )  # `fab-t-50` is no short form of `fab`
        given = words[len(name.split("-")) :]
        fields: tuple[str, ...] = getattr(self._classes.get(name), "short_numbers", ())
        if given and fields and len(given) <= len(fields) and all(number.isdigit() for number in given):
            return {"name": name, **dict(zip(fields, map(int, given), strict=False))}
        if given and name in self._classes:
            form = "-".join([name, *(f.upper() for f in fields)])
            raise UserError(f"{self.kind} {spec!r} is not understood; write {form!r}" + ("" if fields else " alone"))
        self.get(spec)
        raise AssertionError  # get has raised: spec is not a registered name

    def build(self, spec: str | Mapping[str, Any] | T, where: str = "") -> T:
        """A component from its name, its short form, its fields, or itself.

        Args:
            spec: `"pgd-40"`, `{"name": "pgd", "steps": 40}`, or a component, which is returned.
            where: the key of the recipe that holds it, for messages.

        Raises:
            UserError: one line that names the key and what is wrong with it.
        """
        if not isinstance(spec, str | Mapping):
            return spec
        try:
            fields = self.expand(spec)
        except UserError as error:
            raise UserError(f"{where.removesuffix('.')}: {error}" if where else str(error)) from None
        name = fields.pop("name")
        cls = self.get(name)
        known = [field.name for field in dataclasses.fields(cast("Any", cls)) if field.init]
        for key in fields:
            if key not in known:
                near = get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                place = _join(where, key)
                listed = ", ".join(known) or "none"
                raise UserError(f"{place}: {self.kind} {name!r} has no such key{hint} (known: {listed})")
        try:
            return TypeAdapter(cls).validate_python(fields)
        except ValidationError as error:
            raise UserError(first_error(error, where or f"{self.kind} {name!r}")) from None

    def describe(self, component: T) -> dict[str, Any]:
        """The component in the long form that `build` accepts."""
        fields = dataclasses.fields(cast("Any", component))
        values = {f.name: getattr(component, f.name) for f in fields if f.init}
        inside = {key: self.describe(value) for key, value in values.items() if hasattr(value, "registered_name")}
        return {"name": cast("Any", component).registered_name, **values, **inside}
