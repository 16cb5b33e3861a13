"""Operators without a rule that ONNX itself defines by others: their definition, for the types they meet."""

from __future__ import annotations

from typing import Any

import onnx
from onnx import helper

from specqd.errors import CaptureError

from .coded import Coded
from .graph import Function, Node
from .tensors import DTYPES
from .values import Value, is_symbolic, kind_of

__all__ = ["expansion", "type_of"]

_TYPES = {dtype: kind for kind, dtype in DTYPES.items()}
_RANDOM = {
    "Bernoulli",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
}
_KINDS = {"Sequence": "sequences", "Optional": "optional values", "String": "text", "Regex": "text"}


def type_of(value: Value) -> int:
    """ONNX's number of a value's type of elements."""
    if isinstance(value, Coded):
        return value.type
    return int(_TYPES[kind_of(value) if is_symbolic(value) else value.dtype])


def expansion(node: Node, given: list[Value]) -> Function:
    """Return the definition of a node's operator; raises CaptureError, with a reason, if there is none."""
    from .reading import function_of

    if node.op in _RANDOM:
        raise CaptureError(f"{node}: it draws random numbers, which is not compiled; give them as an input")
    if node.op == "ImageDecoder":
        raise CaptureError(f"{node}: files of images are not decoded; give the model their pixels")
    kind = next((words for start, words in _KINDS.items() if start in node.op), None)
    if kind:
        raise CaptureError(f"{node}: {kind} are not compiled; only tensors are")
    if "training" in node.domain:
        raise CaptureError(f"{node}: training is not compiled")
    try:
        schema = onnx.defs.get_schema(node.op, node.opset, node.domain)
    except onnx.defs.SchemaError:
        raise CaptureError(
            f"{node}: there is no such operator in opset {node.opset}, and the model does not define it"
        ) from None
    fixed = [v for v in schema.function_opset_versions if v <= node.opset]
    open_ = [v for v in schema.context_dependent_function_opset_versions if v <= node.opset]
    if fixed:
        text = schema.get_function_with_opset_version(max(fixed))
    elif open_:
        types = [_type(value).SerializeToString() for value in given]
        text = schema.get_context_dependent_function_with_opset_version(
            max(open_), _proto(node).SerializeToString(), types
        )
    else:
        raise CaptureError(f"{node}: there is no rule for this operator")
    proto = onnx.FunctionProto.FromString(text)
    if not proto.node:
        raise CaptureError(f"{node}: there is no rule for this operator as it is used here")
    opsets = {"" if one.domain == "ai.onnx" else one.domain: one.version for one in proto.opset_import}
    function = function_of(proto, {"": node.opset, **opsets})
    defaults = {
        name: _default(attribute)
        for name, attribute in schema.attributes.items()
        if attribute.default_value.name
    }
    return Function(function.nodes, function.inputs, function.outputs, {**defaults, **function.defaults})


def _default(attribute: Any) -> Any:
    value = helper.get_attribute_value(attribute.default_value)
    return value.decode() if isinstance(value, bytes) else value


def _type(value: Value) -> onnx.TypeProto:
    if value is None:
        return onnx.TypeProto()
    shape = [size if isinstance(size, int) else None for size in value.shape]
    return helper.make_tensor_type_proto(type_of(value), shape)


def _proto(node: Node) -> onnx.NodeProto:
    """Return a node as ONNX's own functions take it."""
    found = onnx.NodeProto()
    found.CopyFrom(node.proto)
    given = [helper.make_attribute(a.name, node.attributes[a.name]) if a.ref_attr_name else a for a in found.attribute
             if a.name in node.attributes]  # fmt: skip
    del found.attribute[:]
    found.attribute.extend(given)
    return found
