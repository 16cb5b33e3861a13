"""Read an ONNX file: parse it, check that it is what it should be, and hold it as graphs of plain values."""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto

from specqd.errors import CaptureError, InputError

from .graph import Function, Given, Graph, Node, Reference
from .tensors import tensor_of

__all__ = ["OLDEST", "Model", "function_of", "read"]

OLDEST = 13
"""The first opset that is read."""
_DEPTH = 64


@dataclass(frozen=True)
class Model:
    """A graph, the functions that it may call by domain and name, and where it comes from."""

    graph: Graph
    functions: dict[tuple[str, str], Function]
    source: str


def read(source: str | Path | onnx.ModelProto) -> Model:
    """Read and check a model.

    Raises:
        InputError: the file is not there, no ONNX, or damaged; says where.
        CaptureError: it holds what cannot be compiled, such as text; names it.
    """
    if isinstance(source, onnx.ModelProto):
        proto, folder, name = source, None, source.graph.name or "the ONNX model"
    else:
        path = Path(source)
        proto, folder, name = _parsed(path), path.parent, str(path)
    if not proto.HasField("graph") or not (proto.graph.node or proto.graph.output):
        raise InputError(f"{name} holds no graph; it is no ONNX model, or damaged")
    opsets = _opsets(proto.opset_import, name)
    reader = _Reader(folder, opsets)
    functions = {
        (f.domain, f.name): function_of(f, {**opsets, **_opsets(f.opset_import, name)}, folder)
        for f in proto.functions
    }
    return Model(reader.graph(proto.graph, frozenset()), functions, name)


def function_of(proto: onnx.FunctionProto, opsets: dict[str, int], folder: Path | None = None) -> Function:
    """Read a function; raises as `read` does."""
    reader = _Reader(folder, opsets)
    defaults = {a.name: reader.attribute(a, f"the function {proto.name}") for a in proto.attribute_proto}
    known = frozenset(proto.input)
    return Function(reader.nodes(proto.node, known), tuple(proto.input), tuple(proto.output), defaults)


def _parsed(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist" if not path.exists() else "is no file"
        raise InputError(f"the ONNX model {path} {what}; check the path")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except (DecodeError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is no ONNX model, or damaged: {error}") from error
    return proto


def _opsets(imports: Iterable[onnx.OperatorSetIdProto], name: str) -> dict[str, int]:
    opsets = {"" if one.domain == "ai.onnx" else one.domain: one.version for one in imports}
    version, newest = opsets.get("", OLDEST), onnx.defs.onnx_opset_version()
    if version < OLDEST:
        raise CaptureError(
            f"{name} has opset {version}, and opsets from {OLDEST} on are read; convert it with onnx.version_converter"
        )
    if version > newest:
        raise CaptureError(
            f"{name} has opset {version}, and onnx {onnx.__version__} knows up to {newest}; install a newer onnx"
        )
    return opsets


@dataclass
class _Reader:
    folder: Path | None
    opsets: dict[str, int]
    depth: int = field(default=0)

    def graph(self, proto: onnx.GraphProto, outer: Set[str]) -> Graph:
        """Read a graph; `outer` are the values that those around it have."""
        self.depth += 1
        if self.depth > _DEPTH:
            raise InputError(f"graphs lie in one another more than {_DEPTH} deep at {proto.name!r}")
        where = f"the graph {proto.name!r}"
        if proto.sparse_initializer:
            raise CaptureError(f"{where} has sparse tensors, which are not read; export dense ones")
        tensors: dict[str, Any] = {}
        for one in proto.initializer:
            if not one.name or one.name in tensors:
                raise InputError(f"{where} has two tensors named {one.name!r}, or one without a name")
            tensors[one.name] = tensor_of(one, self.folder)
        inputs = tuple(self._given(one) for one in proto.input if one.name not in tensors)
        names = [one.name for one in inputs]
        if len(set(names)) != len(names) or "" in names:
            raise InputError(f"{where} has two inputs of one name, or one without a name: {names}")
        known = {*outer, *tensors, *names}
        nodes = self.nodes(proto.node, known)
        made = known | {name for node in nodes for name in node.outputs}
        outputs = tuple(one.name for one in proto.output)
        lost = next((name for name in outputs if name not in made), None)
        if lost is not None:
            raise InputError(f"{where} gives {lost!r}, which nothing in it computes; the file is damaged")
        self.depth -= 1
        return Graph(proto.name, nodes, inputs, outputs, tensors)

    def _given(self, proto: onnx.ValueInfoProto) -> Given:
        kind = proto.type.WhichOneof("value")
        if kind not in ("tensor_type", None):
            raise CaptureError(
                f"the input {proto.name!r} is a {kind.removesuffix('_type')}; only tensors are compiled"
            )
        tensor = proto.type.tensor_type
        if not tensor.HasField("shape"):
            return Given(proto.name, tensor.elem_type, None)
        sizes: list[int | str | None] = []
        for one in tensor.shape.dim:
            size = one.dim_value if one.WhichOneof("value") == "dim_value" else one.dim_param or None
            if isinstance(size, int) and not 0 <= size < 1 << 31:
                raise InputError(
                    f"the input {proto.name!r} has the impossible size {size}; export the model again"
                )
            sizes.append(size)
        return Given(proto.name, tensor.elem_type, tuple(sizes))

    def nodes(self, protos: Iterable[onnx.NodeProto], known: Set[str]) -> tuple[Node, ...]:
        """Read nodes in an order in which each finds what it reads, theirs if that is one."""
        order, have = _ordered(list(protos), known), set(known)
        ready = []
        for proto in order:
            ready.append(self._node(proto, have))
            have.update(proto.output)
        return tuple(ready)

    def _node(self, proto: onnx.NodeProto, known: Set[str]) -> Node:
        domain = "" if proto.domain == "ai.onnx" else proto.domain
        label = _label(proto)
        attributes = {one.name: self.attribute(one, label, known) for one in proto.attribute}
        outputs, inputs = tuple(proto.output), tuple(proto.input)
        version = self.opsets.get(domain, 1 if domain else OLDEST)
        return Node(proto.op_type, proto.name, domain, version, inputs, outputs, attributes, proto=proto)

    def attribute(self, proto: AttributeProto, where: str, known: Set[str] = frozenset()) -> Any:
        """Read an attribute; raises CaptureError for a kind that no rule takes."""
        if proto.ref_attr_name:
            return Reference(proto.ref_attr_name)
        if proto.type == AttributeProto.UNDEFINED:
            raise InputError(f"{where}: the attribute {proto.name!r} has no type; the file is damaged")
        try:
            value = onnx.helper.get_attribute_value(proto)
        except ValueError as error:
            raise InputError(
                f"{where}: the attribute {proto.name!r} has no type; the file is damaged"
            ) from error
        match proto.type:
            case AttributeProto.FLOAT | AttributeProto.INT:
                return value
            case AttributeProto.FLOATS | AttributeProto.INTS:
                return list(value)
            case AttributeProto.STRING:
                return value.decode("utf-8", "replace")
            case AttributeProto.STRINGS:
                return [one.decode("utf-8", "replace") for one in value]
            case AttributeProto.TENSOR:
                return tensor_of(value, self.folder, f"{where}: its {proto.name!r}")
            case AttributeProto.GRAPH:
                return self.graph(value, known)
        kind = AttributeProto.AttributeType.Name(proto.type)
        raise CaptureError(f"{where}: its attribute {proto.name!r} is of kind {kind}, which is not compiled")


def _captured(proto: onnx.NodeProto) -> set[str]:
    """The values that the graphs in a node's attributes read from around it."""
    found: set[str] = set()
    for attribute in proto.attribute:
        if attribute.type == AttributeProto.GRAPH:
            body = attribute.g
            own = {one.name for one in (*body.input, *body.initializer)}
            own |= {name for node in body.node for name in node.output}
            read = {name for node in body.node for name in (*node.input, *_captured(node))}
            found |= (read | {one.name for one in body.output}) - own
    return found


def _ordered(protos: list[onnx.NodeProto], known: Set[str]) -> list[onnx.NodeProto]:
    """Return nodes in an order in which each finds what it reads, theirs if that is one."""
    sources = _sources(protos, known)
    if all(max(before, default=-1) < at for at, before in enumerate(sources)):
        return protos
    try:
        return [protos[at] for at in TopologicalSorter(dict(enumerate(sources))).static_order()]
    except CycleError as error:
        some = ", ".join(repr(protos[at].name or protos[at].op_type) for at in error.args[1][:4])
        raise InputError(f"the nodes {some} wait for each other: there is a cycle") from None


def _sources(protos: list[onnx.NodeProto], known: Set[str]) -> list[set[int]]:
    """Which nodes each one reads of."""
    makers: dict[str, int] = {}
    for at, proto in enumerate(protos):
        for name in filter(None, proto.output):
            if name in known or name in makers:
                raise InputError(f"two nodes give {name!r}, or a node and the graph; the file is damaged")
            makers[name] = at
    sources = []
    for proto in protos:
        read = {*proto.input, *_captured(proto)} - {""} - known
        lost = next((name for name in read if name not in makers), None)
        if lost is not None:
            raise InputError(f"{_label(proto)} reads {lost!r}, which nothing gives; the file is damaged")
        sources.append({makers[name] for name in read})
    return sources


def _label(proto: onnx.NodeProto) -> str:
    return f"the node {proto.name or next(iter(proto.output), '')!r} ({proto.op_type})"
