"""Components by name: a frozen dataclass, registered in its own file, is its own schema in a recipe.

    @objectives.register("trades")
    @dataclass(frozen=True)
    class Trades(Objective):
        beta: float = 6.0

is then found by `trades` and `{name: trades, beta: 3}`. To add a component is to add one file to its folder, or to name
a class from outside the package by its address: `my_file.py:Trades`, `my_package.module:Trades`.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, Generic, TypeVar, cast, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from dualhead.components import plugins
from dualhead.components.fields import is_written
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
        base: class that all of them derive from.
        imported_as: name of the component that stands for `package.module:factory`, if the kind has one.
    """

    def __init__(self, kind: str, package: str, base: type = object, *, imported_as: str | None = None) -> None:
        self.kind = kind
        self.base = base
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
            self._refuse_unfit(cls, f"{self.kind} {name!r}: ")
            if not _ships(cls):
                self._load()  # what ships has its names first
            known = self._classes.get(name)
            again = known is not None and (known.__module__, known.__qualname__) == (cls.__module__, cls.__qualname__)
            if known is not None and (not again or plugins.is_loading()):
                other = "ships" if _ships(known) else f"is {known.__qualname__} of {plugins.origin(known)}"
                raise UserError(f"{self.kind} {name!r} is registered twice: one {other}; choose another name")
            self._classes[name] = cls
            address = plugins.address_of_registered(cls, lambda: self._forget(name, cls))
            _mark(cls, name, numbers, text, address)
            return cls

        return decorate

    def _forget(self, name: str, cls: type) -> None:
        if self._classes.get(name) is cls:
            del self._classes[name]

    def _refuse_unfit(self, found: object, begin: str) -> None:
        """Refuse what is no frozen dataclass of this kind.

        Args:
            found: what a name or an address stands for.
            begin: of the message.

        Raises:
            UserError: saying what it is, and what it must be.
        """
        base = self.base
        must = f"a frozen dataclass derived from {base.__module__.removesuffix('.base')}.{base.__name__}"
        must = "a frozen dataclass" if base is object else must
        if not isinstance(found, type):
            raise UserError(f"{begin}is a {type(found).__name__}; it must be {must}")
        if not issubclass(found, base):
            parents = ", ".join(parent.__name__ for parent in found.__bases__)
            raise UserError(f"{begin}{found.__name__} is a class derived from {parents}; it must be {must}")
        parameters = found.__dict__.get("__dataclass_params__")
        if parameters is None or not parameters.frozen:
            kind = "no dataclass" if parameters is None else "a dataclass that is not frozen"
            raise UserError(f"{begin}{found.__name__} is {kind}; it must be {must}; write @dataclass(frozen=True)")
        if inspect.isabstract(found):
            lacking = ", ".join(sorted(cast("Any", found).__abstractmethods__))
            raise UserError(f"{begin}{found.__name__} must define {lacking}, as {base.__name__} says")

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

    def origin(self, name: str) -> str | None:
        """Where a registered component comes from: a package, file or module; None if it ships."""
        return plugins.origin(self.get(name))

    def known_as(self, name: str) -> str:
        """The registered name that one in other letters means (`TRADES`, `pairwise-cnn`); else the name itself."""
        self._load()
        if name in self._classes:
            return name
        return next((known for known in self._classes if folded(known) == folded(name)), name)

    def get(self, name: str) -> type[T]:
        """The class registered under a name, in any case and with - or _, or at an address.

        Raises:
            UserError: naming the nearest known names, if there is none; or if an address holds none.
        """
        name = self.known_as(name)
        if name not in self._classes and plugins.split_address(name):
            return self._addressed(name)[1]
        if name not in self._classes:
            near = get_close_matches(name.lower().rstrip("-0123456789"), self._classes, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            known = ", ".join(self.names())
            raise UserError(f"unknown {self.kind} {name!r}; {hint}known: {known}{plugins.broken()}")
        return cast("type[T]", self._classes[name])

    def _addressed(self, address: str) -> tuple[str, type[T]]:
        """The name that stands for an address in any folder, and its class, which becomes a component if need be."""
        place, found = plugins.find(address, f"{self.kind} {address!r}")
        self._refuse_unfit(found, f"{self.kind} {address!r}: ")
        if "registered_name" not in found.__dict__:
            _mark(found, found.__name__, (), None, place)
        elif "address" not in found.__dict__ and not _ships(found):
            cast("Any", found).address = place
        return found.__dict__.get("address", found.registered_name), found

    def expand(self, spec: str | Mapping[str, Any]) -> dict[str, Any]:
        """A spec in its long form: `pgd-40` becomes `{"name": "pgd", "steps": 40}`, a relative address an absolute one.

        Installed packages are asked for names that are not known.

        Raises:
            UserError: if the name is unknown or the short form does not fit it.
        """
        self._load()
        if not isinstance(spec, str):
            if "name" not in spec:
                raise UserError(f"{self.kind} needs a name, {{name: ...}}; known: {', '.join(self.names())}")
            return {**self.expand(str(spec["name"])), **{k: v for k, v in spec.items() if k != "name"}}
        try:
            return self._expanded(spec)
        except UserError:
            if plugins.split_address(spec) or not plugins.load_installed():
                raise
            return self._expanded(spec)

    def code_named(self, spec: object) -> str | None:
        """The code from outside that a spec, or one within it, names, and that `build` would run; None for none."""
        self._load()
        if isinstance(spec, str):
            head, _, rest = spec.partition(":")
            if head == self._imported_as:
                return rest
            return spec if head not in self._classes and plugins.split_address(spec) is not None else None
        if not isinstance(spec, Mapping):
            return None
        name = str(spec.get("name"))
        head = name.partition(":")[0]
        if head == self._imported_as or (head not in self._classes and ":" in name):
            return str(spec.get("path", name))
        return next((code for code in map(self.code_named, spec.values()) if code is not None), None)

    def located(self, spec: str | Mapping[str, Any]) -> str | dict[str, Any]:
        """A spec as it was written, except for an address, which is made one that means the same in any folder."""
        name = spec if isinstance(spec, str) else str(spec.get("name"))
        self._load()
        if name.partition(":")[0] not in self._classes and plugins.split_address(name):
            return self.expand(spec)
        return spec if isinstance(spec, str) else dict(spec)

    def _expanded(self, spec: str) -> dict[str, Any]:
        if self.known_as(spec) in self._classes:
            return {"name": self.known_as(spec)}
        if spec.endswith(")") and not plugins.split_address(spec):
            return self._with_options(spec)
        head, colon, tail = spec.partition(":")
        if colon:
            head = head if head in self._classes or "." in head or "/" in head else self.known_as(head)
            field = getattr(self._classes.get(head), "short_text", None)
            if field is not None:
                return {"name": head, field: tail}
            if head not in self._classes and (self._imported_as is not None or plugins.split_address(spec)):
                return self._from_outside(spec)
        told = re.sub(r"(?<=[A-Za-z])(?=\d)", "-", spec) if self._is_run_together(spec) else spec
        words = re.split("[-_]", told)
        prefixes = {len(words[:count]): self.known_as("-".join(words[:count])) for count in range(len(words), 0, -1)}
        count, name = next(
            ((count, prefix) for count, prefix in prefixes.items() if prefix in self._classes), (len(words), spec)
        )  # `fab-t-50` is no short form of `fab`
        given = words[count:]
        fields: tuple[str, ...] = getattr(self._classes.get(name), "short_numbers", ())
        if given and fields and len(given) <= len(fields) and all(number.isdigit() for number in given):
            return {"name": name, **dict(zip(fields, map(int, given), strict=False))}
        if given and name in self._classes:
            form = "-".join([name, *(f.upper() for f in fields)])
            raise UserError(f"{self.kind} {spec!r} is not understood; write {form!r}" + ("" if fields else " alone"))
        self.get(spec)
        raise AssertionError  # get has raised: spec is not a registered name

    def _with_options(self, spec: str) -> dict[str, Any]:
        """The long form of `pgd-40(target=next, restarts=5)`, which is also how labels are written."""
        head, _, inside = spec[:-1].partition("(")
        fields = {}
        for option in inside.split(",") if inside.strip() else ():
            key, given, value = (word.strip() for word in option.partition("="))
            if not given or not key:
                raise UserError(f"{self.kind} {spec!r} is not understood; write NAME(KEY=VALUE,...)")
            fields[key] = value
        return {**self._expanded(head.strip()), **fields}

    def _is_run_together(self, spec: str) -> bool:
        """Whether a spec is a name with its first number right behind it, as people write it: `resnet18`, `pgd40`."""
        found = re.match(r"([A-Za-z]+)\d", spec)
        return found is not None and bool(getattr(self._classes.get(self.known_as(found[1])), "short_numbers", ()))

    def _from_outside(self, spec: str) -> dict[str, Any]:
        """The long form of an address: of a class of this kind or, where the kind has that, of a function."""
        if self._imported_as is None:
            return {"name": self._addressed(spec)[0]}
        try:
            place, found = plugins.find(spec)
        except UserError:
            if plugins.is_file(spec.rpartition(":")[0]):
                raise
            place, found = spec, None  # a module is looked for again where the model is made, and its lack told there
        if isinstance(found, type) and issubclass(found, self.base):
            return {"name": self._addressed(spec)[0]}
        return {"name": self._imported_as, str(getattr(self._classes[self._imported_as], "short_text", None)): place}

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
        place = where or f"{self.kind} {name!r}"
        try:
            return TypeAdapter(cls).validate_python(fields)
        except ValidationError as error:
            raise UserError(first_error(error, place)) from None
        except Exception as error:  # whatever somebody else's class may raise; ours are right
            if _ships(cls):
                raise
            why = _unreadable_field(cls) or f"failed: {plugins.reason(error)}"
            raise UserError(f"{place.removesuffix('.')}: {name}: {why}") from error

    def describe(self, component: T) -> dict[str, Any]:
        """The component in the long form that `build` accepts."""
        fields = dataclasses.fields(cast("Any", component))
        held = [(f, getattr(component, f.name)) for f in fields if f.init]
        values = {f.name: value for f, value in held if is_written(f, value)}
        inside: dict[str, Any] = {
            key: self.describe(value) for key, value in values.items() if hasattr(value, "registered_name")
        }
        for key, value in values.items():
            if isinstance(value, tuple) and value and all(hasattr(one, "describe") for one in value):
                inside[key] = [one.describe() for one in value]
            elif isinstance(value, tuple) and value and all(hasattr(one, "registered_name") for one in value):
                inside[key] = [self.describe(one) for one in value]
            elif key not in inside and hasattr(value, "describe"):
                inside[key] = value.describe()
        cls = type(component)
        return {"name": cls.__dict__.get("address", cast("Any", component).registered_name), **values, **inside}


def folded(name: str) -> str:
    """A name without what people vary when they type it: case, and - or _."""
    return name.lower().replace("_", "-")


def _ships(cls: type) -> bool:
    return cls.__module__.startswith("dualhead.")


def _mark(cls: type, name: str, numbers: tuple[str, ...], text: str | None, address: str | None) -> None:
    """Make a dataclass a component: how it is called, short forms, and where it comes from if that is outside."""
    described = cast("Any", cls)
    described.__pydantic_config__ = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    described.registered_name = name
    described.short_numbers = numbers
    described.short_text = text
    if address is not None:
        described.address = address


def _unreadable_field(cls: type) -> str | None:
    """Describe the first field whose type no value can be checked against; return None if all are fine."""
    module = sys.modules.get(cls.__module__)
    names = dict(vars(module)) if module is not None else {}
    for field in dataclasses.fields(cast("Any", cls)):
        try:
            alone = type("Alone", (), {"__annotations__": {field.name: field.type}})
            kind = get_type_hints(alone, names, include_extras=True)[field.name]
            TypeAdapter(kind, config=None if _has_config(kind) else ConfigDict(arbitrary_types_allowed=True))
        except Exception as error:  # of several libraries
            return f"field {field.name!r} has a type that cannot be checked: {plugins.reason(error)}"
    return None


def _has_config(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) or hasattr(kind, "model_config")
