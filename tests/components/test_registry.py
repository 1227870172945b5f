"""Components by name: short forms, long forms, and one clear line for whatever does not fit."""

from dataclasses import MISSING, FrozenInstanceError, dataclass, fields

import pytest

from dualhead.components.registry import Registry
from dualhead.errors import UserError
from dualhead.recipe.schema import REGISTRIES


class Shape:
    pass


def make_registry(**options):
    shapes = Registry("shape", "dualhead.errors", **options)

    @shapes.register("square", numbers=("side", "copies"))
    @dataclass(frozen=True)
    class Square(Shape):
        side: int = 1
        copies: int = 1
        colour: str = "black"

        def __post_init__(self):
            if self.side < 1:
                raise UserError(f"side must be at least 1, got {self.side}")

    @shapes.register("circle")
    @dataclass(frozen=True)
    class Circle(Shape):
        radius: float = 1.0

    @shapes.register("imported", text="path")
    @dataclass(frozen=True)
    class Imported(Shape):
        path: str

    @shapes.register("half-moon", numbers=("phase",))
    @dataclass(frozen=True)
    class HalfMoon(Shape):
        phase: int = 0

    return shapes


SHAPES = make_registry(imported_as="imported")


@pytest.mark.parametrize(
    ("spec", "fields"),
    [
        ("square", {"name": "square"}),
        ("square-4", {"name": "square", "side": 4}),
        ("square-4-2", {"name": "square", "side": 4, "copies": 2}),
        ({"name": "square", "side": 4}, {"name": "square", "side": 4}),
        ({"name": "square-4", "copies": 3}, {"name": "square", "side": 4, "copies": 3}),
        ({"name": "square-4", "side": 5}, {"name": "square", "side": 5}),
        ("half-moon", {"name": "half-moon"}),
        ("half-moon-3", {"name": "half-moon", "phase": 3}),
        ("imported:a.b:c", {"name": "imported", "path": "a.b:c"}),
        ("a.b:c", {"name": "imported", "path": "a.b:c"}),
    ],
)
def test_short_and_long_forms_mean_the_same(spec, fields):
    assert SHAPES.expand(spec) == fields
    built = SHAPES.build(spec)
    assert built == SHAPES.build(fields)
    assert SHAPES.build(SHAPES.describe(built)) == built
    assert SHAPES.build(built) is built


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sqare", "unknown shape 'sqare'; did you mean 'square'? known: circle, half-moon, imported, square"),
        ("zzz", "unknown shape 'zzz'; known: circle, half-moon, imported, square"),
        ("square-4-2-1", "shape 'square-4-2-1' is not understood; write 'square-SIDE-COPIES'"),
        ("square-x", "shape 'square-x' is not understood; write 'square-SIDE-COPIES'"),
        ("circle-4", "shape 'circle-4' is not understood; write 'circle' alone"),
        ({"side": 4}, "shape needs a name, {name: ...}; known: circle, half-moon, imported, square"),
        ({"name": "square", "sied": 4}, "sied: shape 'square' has no such key; did you mean 'side'? "
         "(known: side, copies, colour)"),
        ({"name": "square", "side": 0}, "shape 'square': side must be at least 1, got 0"),
        ({"name": "square", "side": "many"}, "shape 'square'.side: input should be a valid integer, unable to parse "
         "string as an integer (got 'many')"),
        ({"name": "circle", "radius": [1]}, "shape 'circle'.radius: input should be a valid number"),
        ("imported", "shape 'imported'.path: missing; this key is required"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(spec, message):
    with pytest.raises(UserError) as caught:
        SHAPES.build(spec)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sqare", "model.shape: unknown shape 'sqare'"),
        ({"name": "square", "sied": 4}, "model.shape.sied: shape 'square' has no such key"),
        ({"name": "square", "side": 0}, "model.shape: side must be at least 1"),
        ({"name": "square", "side": "x"}, "model.shape.side: input should be"),
    ],
)
def test_the_place_in_the_recipe_is_named(spec, message):
    with pytest.raises(UserError) as caught:
        SHAPES.build(spec, where="model.shape")
    assert str(caught.value).startswith(message)


def test_without_a_component_for_imports_a_colon_names_a_class():
    with pytest.raises(UserError, match=r"shape 'a\.b:c': there is no module 'a', neither installed nor in "):
        make_registry().build("a.b:c")


def test_only_frozen_dataclasses_and_each_name_once():
    shapes = make_registry()
    with pytest.raises(UserError, match="shape 'plain': Plain is no dataclass; it must be a frozen dataclass"):
        shapes.register("plain")(type("Plain", (), {}))
    with pytest.raises(UserError, match=r"shape 'circle' is registered twice: one is .*Circle of module .*; choose"):

        @shapes.register("circle")
        @dataclass(frozen=True)
        class Disc(Shape):
            pass


def test_fields_convert_as_the_schema_says():
    assert SHAPES.build({"name": "circle", "radius": 2}).radius == 2.0
    assert SHAPES.build({"name": "square", "side": "3"}).side == 3


@pytest.mark.parametrize("kind", sorted(REGISTRIES))
def test_every_component_of_the_package_is_a_frozen_dataclass_with_words(kind):
    registry = REGISTRIES[kind]
    assert registry.names() == sorted(registry.names())
    for name in registry.names():
        cls = registry.get(name)
        assert cls.registered_name == name
        assert cls.__dataclass_params__.frozen
        assert cls.__doc__
        assert not cls.__doc__.startswith(f"{cls.__name__}("), f"{cls.__name__} has no docstring of its own"


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in sorted(REGISTRIES) for name in REGISTRIES[kind].names()]
)
def test_every_component_with_defaults_describes_itself_as_it_is_built(kind, name):
    registry = REGISTRIES[kind]
    required = [f for f in fields(registry.get(name)) if f.init and f.default is f.default_factory is MISSING]
    values = {"eps": 0.1, "optimiser": "SGD", "backbone": "cnn-4", "norm": "group", "like": "patch"}
    if kind == "threats" and name in ("L0", "patch"):
        values["eps"] = 2.0  # pixels
    needed = {f.name: values.get(f.name, "a:b") for f in required}
    built = registry.build({"name": name, **needed})
    assert registry.build(registry.describe(built)) == built
    first = next(iter(registry.describe(built).keys() - {"name"}), None)
    if first is not None:
        with pytest.raises(FrozenInstanceError):
            setattr(built, first, None)
    with pytest.raises(UserError, match="has no such key"):
        registry.build({"name": name, **needed, "no_such_key": 1})
