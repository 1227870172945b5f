"""Cutting by torch.fx: trace the containers around the layer, and let everything else be a leaf.

Control flow inside blocks does not matter, since blocks are leaves. For the containers, fx's symbolic trace is given
the values that an example takes along the way (a concolic trace): sizes stay symbolic, so that the batch may differ
from the example's, while branches on sizes, types and None are decided as the example decides them. A branch on what a
tensor holds is refused.

The trace is made once in training mode and once in evaluation mode, and each half runs the one of its own mode: a
functional dropout or an `if self.training` in a container stays alive.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from dualhead.heads.splitting.base import (
    CannotCut,
    Cut,
    Features,
    fresh_copy,
    graft,
    has_state,
    shape_of,
    tensors_of,
    undisturbed,
)
from dualhead.system.outputs import logits_of

_ROOT = "model."
_METADATA = {"size", "dim", "ndimension", "numel", "nelement", "stride", "type", "get_device", "element_size"} | {
    name for name in dir(Tensor) if name.startswith("is_")
}
_CONSTANTS = (bool, str, type(None), torch.layout, torch.memory_format)


class _Whole(nn.Module):
    """The model with defaulted arguments left alone and logits as its output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.model(images))


class _Proxy(fx.Proxy):
    """A traced value that also knows what it is on the example."""

    @property
    def value(self) -> Any:
        return cast("_Tracer", self.tracer).values[self.node]

    def __getattr__(self, name: str) -> Any:
        held = getattr(self.value, name)  # AttributeError as the value itself would raise it
        if callable(held):
            return fx.proxy.Attribute(self, name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __iter__(self) -> Iterator[Any]:
        return iter([self[i] for i in range(len(self))])  # type: ignore[index]  # fx defines it

    def __len__(self) -> int:
        if isinstance(self.value, Tensor):
            raise CannotCut("a container iterates over a batch")
        return len(self.value)

    def _number(self) -> Any:
        if isinstance(self.value, Tensor):
            raise CannotCut("a container's control flow depends on what a tensor holds")
        return self.value

    def __index__(self) -> int:
        return int(self._number())

    def __int__(self) -> int:
        return int(self._number())

    def __float__(self) -> float:
        return float(self._number())

    def __bool__(self) -> bool:
        return bool(self._number())


class _Tracer(fx.Tracer):
    """Traces a model's containers on the way to a layer, computing the example's values alongside.

    Args:
        at: the layer's name in the traced root.
        images: the example.
    """

    proxy_buffer_attributes = True

    def __init__(self, at: str, images: Tensor) -> None:
        super().__init__()
        self.at = at
        self.images = images
        self.values: dict[fx.Node, Any] = {}
        self.cut: fx.Node | None = None
        self._computing = False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        del m
        return not self.at.startswith(module_qualified_name + ".")

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self._computing:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        if self._computing:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        return a.node if issubclass(type(a), fx.Proxy) else super().create_arg(a)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        self.values[node] = self._value(node)
        return _Proxy(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        # Numbers that a layer gives (a grid's height and width, say) cannot cross: they are kept as on the example, and
        # the check on another batch size tells if they depend on it.
        constants = (*_CONSTANTS, int, float) if kind == "call_module" else _CONSTANTS
        opened = self._open(proxy, self.values[proxy.node], constants)
        if kind == "call_module" and target == self.at:
            if self.cut is not None:
                raise CannotCut("it is called more than once in a forward pass")
            self.cut = next(iter(reversed(self.graph.nodes)))
        return opened

    def _value(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self.images
        if node.op == "get_attr":
            return self._fetch(cast("str", node.target))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._known)
        self._computing = True
        try:
            if node.op == "call_module":
                return self.root.get_submodule(cast("str", node.target))(*args, **kwargs)
            if node.op == "call_method":
                value = getattr(args[0], cast("str", node.target))(*args[1:], **kwargs)
            else:
                value = cast("Callable[..., Any]", node.target)(*args, **kwargs)
        finally:
            self._computing = False
        if isinstance(value, int | float | bool) and self._reads_data(node):
            raise CannotCut("a container's control flow depends on what a tensor holds")
        return value

    def _known(self, node: fx.Node) -> Any:
        return self.values[node] if node in self.values else self._fetch(cast("str", node.target))

    def _fetch(self, name: str) -> Any:
        value: Any = self.root
        self._computing = True
        try:
            for atom in name.split("."):
                value = getattr(value, atom)
        finally:
            self._computing = False
        return value

    def _reads_data(self, node: fx.Node) -> bool:
        """Whether a number was made from a tensor's contents, not from its shape or type."""
        if node.target is getattr or node.target in _METADATA or getattr(node.target, "__name__", "") in _METADATA:
            return False
        return any(isinstance(self._known(argument), Tensor) for argument in node.all_input_nodes)

    def _open(self, proxy: fx.Proxy, value: Any, constants: tuple[type, ...]) -> Any:
        """Return the same structure as the value, with a proxy for each tensor in it."""
        if isinstance(value, constants):
            return value
        if isinstance(value, Mapping):
            opened: Any = copy.copy(value)
            for key, item in value.items():
                opened[key] = self._open(cast("Any", proxy)[key], item, constants)
            return opened
        if type(value) in (tuple, list):
            return type(value)(self._open(cast("Any", proxy)[i], item, constants) for i, item in enumerate(value))
        return proxy


class _Trace:
    """One trace of a model in one mode, divided at the layer."""

    def __init__(self, model: nn.Module, at: str, images: Tensor, training: bool) -> None:
        self._at = at
        self.mode = "train" if training else "eval"
        scratch = _Whole(model).train(training)
        tracer = _Tracer(_ROOT + at, images.clone())  # a forward may work on them in place
        graph = tracer.trace(scratch)
        if tracer.cut is None:
            raise CannotCut("it is not called in a forward pass")
        values = {node: tracer.values.get(node) for node in graph.nodes}
        self._sizes = {node: (value.shape, value.dtype) for node, value in values.items() if isinstance(value, Tensor)}
        self._prune(graph, tracer.cut)
        self._rename(graph, scratch)
        self._divide(graph, tracer.cut)

    def _prune(self, graph: fx.Graph, cut: fx.Node) -> None:
        """Drop what only branches needed: numbers, attributes and entries that nothing uses."""
        for node in reversed(graph.nodes):
            passive = node.op == "get_attr" or node.target is operator.getitem or node not in self._sizes
            if (
                node is not cut
                and not node.users
                and passive
                and node.op not in ("placeholder", "output", "call_module")
            ):
                graph.erase_node(node)

    def _rename(self, graph: fx.Graph, scratch: _Whole) -> None:
        """Restore the model's own names; tensors that the trace made get one of ours."""
        self.constants: dict[str, Tensor] = {}
        for node in graph.nodes:
            if node.op not in ("call_module", "get_attr"):
                continue
            name = cast("str", node.target)
            if name.startswith(_ROOT):
                node.target = name.removeprefix(_ROOT)
                continue
            node.target = f"{self.mode}{name}"
            self.constants[node.target] = getattr(scratch, name)

    def _divide(self, graph: fx.Graph, cut: fx.Node) -> None:
        nodes = list(graph.nodes)
        place = nodes.index(cut) + 1
        behind = set(nodes[place:])
        crossing = self._crossing(behind)
        first = next(i for i, node in enumerate(nodes) if node.op == "call_module" and node.target == self._at)
        self.crossing = [node for node in (*nodes[first:], *nodes[:first]) if node in crossing]  # the layer's own first
        if not crossing.intersection(nodes[first:place]):
            raise CannotCut("nothing behind it uses its output")
        self.trunk, self.tail = fx.Graph(), fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        for node in nodes[:place]:
            copied[node] = self.trunk.node_copy(node, copied.__getitem__)
        outputs = tuple(
            self.trunk.call_function(shape_of, (copied[node],)) if self._only_shape(node, behind) else copied[node]
            for node in self.crossing
        )
        self.trunk.output(outputs[0] if len(outputs) == 1 else outputs)
        features = self.tail.placeholder("features")
        moved = {
            node: features if len(self.crossing) == 1 else self.tail.call_function(_item, (features, index))
            for index, node in enumerate(self.crossing)
        }
        for node in nodes:
            if node in behind and node not in moved:
                moved[node] = self.tail.node_copy(node, moved.__getitem__)
        for half in (self.trunk, self.tail):
            for node in reversed(half.nodes):
                if node.op == "get_attr" and not node.users:
                    half.erase_node(node)

    def _only_shape(self, node: fx.Node, behind: set[fx.Node]) -> bool:
        """Whether the tail asks a tensor for its shape alone."""
        used = [user for user in node.users if user in behind]
        return all(u not in self._sizes and (u.target is getattr or u.target in _METADATA) for u in used)

    def _crossing(self, behind: set[fx.Node]) -> set[fx.Node]:
        """Find the tensors that nodes behind the cut take from before it; extend `behind` by values made again."""
        crossing: set[fx.Node] = set()
        needed = list(behind)
        while needed:
            for node in needed.pop().all_input_nodes:
                if node in behind:
                    continue
                if node.op == "placeholder" or (node.op != "get_attr" and node in self._sizes):
                    crossing.add(node)
                    continue
                if node.op == "call_module":
                    raise CannotCut(f"{node.target} gives something else than tensors, which would have to cross")
                behind.add(node)
                needed.append(node)
        return crossing

    def signature(self) -> list[tuple[str, torch.Size, torch.dtype]]:
        """Describe the tensors that cross, comparably between the modes: layers by name, all by shape and type."""
        kinds = (str(node.target) if node.op == "call_module" else "" for node in self.crossing)
        return [(kind, *self._sizes[node]) for kind, node in zip(kinds, self.crossing, strict=True)]


def _item(features: tuple[Tensor, ...], index: int) -> Tensor:
    return features[index]


class Traced(nn.Module):
    """One half of a traced model: the model's own modules under their own names, run by the graph of the mode it is in.

    Args:
        train: the half's graph in training mode.
        evaluation: the half's graph in evaluation mode.
        state: name to module, parameter or buffer, as the graphs call them.
        constants: name to tensor that the trace made.
        persistent: names of the buffers, among others, that the model's state dict holds.
    """

    def __init__(
        self, train: fx.Graph, evaluation: fx.Graph, state: Mapping[str, Any], constants: Mapping[str, Tensor],
        persistent: Collection[str],
    ) -> None:  # fmt: skip
        super().__init__()
        for name in sorted(state, key=lambda name: name.count(".")):
            if not _holds(self, name):
                graft(self, name, state[name], persistent=name in persistent)
        for name, tensor in constants.items():
            graft(self, name, tensor, persistent=False)
        # The compiled functions take the module as an argument, so copies of this one may share them.
        self._run = {True: _compile(self, train), False: _compile(self, evaluation)}

    def forward(self, features: Features) -> Features:
        """Compute the half: images to features, or features to logits."""
        return self._run[self.training](self, features)


def _compile(root: nn.Module, graph: fx.Graph) -> Callable[[nn.Module, Features], Features]:
    return cast("Callable[[nn.Module, Features], Features]", type(fx.GraphModule(root, graph)).forward)


def _holds(root: nn.Module, name: str) -> bool:
    value: Any = root
    for atom in name.split("."):
        if not hasattr(value, atom):
            return False
        value = getattr(value, atom)
    return True


def _attribute(root: nn.Module, name: str) -> Any:
    value: Any = root
    for atom in name.split("."):
        value = getattr(value, atom)
    return value


def _targets(*graphs: fx.Graph) -> list[str]:
    return [str(n.target) for graph in graphs for n in graph.nodes if n.op in ("call_module", "get_attr")]


def traced_split(model: nn.Module, at: str, images: Tensor, modes: Sequence[bool]) -> Cut:
    """Cut by tracing the containers on the way to the layer.

    Args:
        model: the model.
        at: name of the layer.
        images: the example.
        modes: whether to trace in training mode; of one trace only, both modes make use.

    Raises:
        CannotCut: saying what in the containers cannot be traced.
    """
    with undisturbed(images, model):
        try:
            traces = {training: _Trace(model, at, images, training) for training in modes}
        except CannotCut:
            raise
        except Exception as error:  # any code of any model may run here, and fail in its own way on a traced value
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise CannotCut(f"tracing its containers fails: {reason[0]}") from error
    train, evaluation = traces[modes[0]], traces[modes[-1]]
    if train.signature() != evaluation.signature():
        raise CannotCut("what crosses the cut differs between training and evaluation mode")
    copied = fresh_copy(model)
    constants = {**train.constants, **evaluation.constants}
    before = {n: _attribute(copied, n) for n in _targets(train.trunk, evaluation.trunk) if n not in constants}
    behind = {n: _attribute(copied, n) for n in _targets(train.tail, evaluation.tail) if n not in constants}
    for name in before.keys() & behind.keys():
        if isinstance(behind[name], nn.Module) and not has_state(behind[name]):
            behind[name] = copy.deepcopy(behind[name])  # a dropout called on both sides: each has its own mode
    _assign_unused(copied, before, behind)

    def half(first: fx.Graph, second: fx.Graph, state: dict[str, Any]) -> Traced:
        used = set(_targets(first, second))
        kept = {name: tensor for name, tensor in constants.items() if name in used}
        return Traced(first, second, state, kept, copied.state_dict().keys()).train(model.training)

    return Cut(half(train.trunk, evaluation.trunk, before), half(train.tail, evaluation.tail, behind), "traced", at)


def _assign_unused(model: nn.Module, before: dict[str, Any], behind: dict[str, Any]) -> None:
    """Assign state that no graph mentions to the half that uses the same tensor, else to the trunk: no key is lost."""

    def covered(name: str, part: Mapping[str, Any]) -> bool:
        return any(name == key or name.startswith(key + ".") for key in part)

    def tensors(part: Mapping[str, Any]) -> set[int]:
        return {i for v in part.values() for i in (tensors_of(v) if isinstance(v, nn.Module) else [id(v)])}

    used_behind, used_before = tensors(behind), tensors(before)
    for name in model.state_dict():
        if covered(name, before) or covered(name, behind) or name.endswith("_extra_state"):
            continue
        tensor = _attribute(model, name)
        part = behind if id(tensor) in used_behind and id(tensor) not in used_before else before
        part[name] = tensor
