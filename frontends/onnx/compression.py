"""Compressed weights of a model that is exported: in ONNX's own small types, or as bytes that are looked up."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from specqd.errors import ContractError

from .translations import DOMAIN

__all__ = ["LOWERED", "STANDARD", "replace_weights"]

STANDARD, LOWERED = 24, 23
"""The first opset whose DequantizeLinear takes FLOAT8E8M0 scales, and the first that has Attention."""

_BLOCK = 32


def replace_weights(model: ir.Model, *, lowered: bool) -> None:
    """Put ONNX's operators in the place of each `specqd.mxfp4(blocks uint8 [N, K/2], scales uint8 [N, K/32])`."""
    graph = model.graph
    for node in [node for node in graph if node.domain == DOMAIN]:
        blocks, scales = node.inputs
        if blocks is None or scales is None or blocks.const_value is None or scales.const_value is None:
            raise ContractError("an MXFP4 matrix is computed and no weight; export the program before that")
        make = _looked_up if lowered else _dequantised
        nodes = make(graph, blocks, scales)
        ir.convenience.replace_nodes_and_values(
            graph, node, [node], nodes, node.outputs, [nodes[-1].outputs[0]]
        )
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
    model.opset_imports.pop(DOMAIN, None)


def _dequantised(graph: ir.Graph, blocks: ir.Value, scales: ir.Value) -> list[ir.Node]:
    """The bytes are those of MXFP4 as they are: ONNX packs two codes into one in the same order."""
    packed, exponents = (np.ascontiguousarray(v.const_value.numpy()) for v in (blocks, scales))
    shape = (packed.shape[0], packed.shape[1] * 2)
    codes = ir.PackedTensor(
        packed.reshape(-1), ir.DataType.FLOAT4E2M1, shape=shape, name=f"{blocks.name}.fp4"
    )
    powers = ir.Tensor(exponents.view(ml_dtypes.float8_e8m0fnu), name=f"{scales.name}.e8m0")
    given = [_initializer(graph, tensor) for tensor in (codes, powers)]
    attributes = {"axis": 1, "block_size": _BLOCK, "output_dtype": int(ir.DataType.FLOAT)}
    return [_node("DequantizeLinear", given, attributes, f"{blocks.name}.weight", ir.DataType.FLOAT)]


def _looked_up(graph: ir.Graph, blocks: ir.Value, scales: ir.Value) -> list[ir.Node]:
    """Split each byte into two codes, and look up what they and the scales stand for."""
    rows, half = blocks.const_value.shape.numpy()
    name = blocks.name

    def constant(label: str, array: np.ndarray) -> ir.Value:
        known = graph.initializers.get(f"mxfp4.{label}")
        return known or _initializer(graph, ir.Tensor(array, name=f"mxfp4.{label}"))

    codes = np.arange(256, dtype=np.uint8)
    table = constant("elements", codes[:16].view(ml_dtypes.float4_e2m1fn).astype(np.float32))
    powers = constant("scales", codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32))
    last = constant("last", np.array([-1]))
    low = _node("BitwiseAnd", [blocks, constant("fifteen", np.array(15, np.uint8))], {}, f"{name}.low")
    high = _node(
        "BitShift", [blocks, constant("four", np.array(4, np.uint8))], {"direction": "RIGHT"}, f"{name}.high"
    )
    pair = [
        _node("Unsqueeze", [part.outputs[0], last], {}, f"{part.outputs[0].name}.one") for part in (low, high)
    ]
    both = _node("Concat", [part.outputs[0] for part in pair], {"axis": -1}, f"{name}.both")
    wide = _node("Cast", [both.outputs[0]], {"to": int(ir.DataType.INT32)}, f"{name}.codes")
    shape = constant(f"blocks_{rows}_{half}", np.array([rows, half * 2 // _BLOCK, _BLOCK]))
    split = _node("Reshape", [wide.outputs[0], shape], {}, f"{name}.blocks")
    elements = _node("Gather", [table, split.outputs[0]], {}, f"{name}.elements")
    exponents = _node("Cast", [scales], {"to": int(ir.DataType.INT32)}, f"{name}.exponents")
    factors = _node("Gather", [powers, exponents.outputs[0]], {}, f"{name}.factors")
    spread = _node("Unsqueeze", [factors.outputs[0], last], {}, f"{name}.spread")
    scaled = _node("Mul", [elements.outputs[0], spread.outputs[0]], {}, f"{name}.scaled")
    matrix = constant(f"matrix_{rows}_{half}", np.array([rows, half * 2]))
    whole = _node("Reshape", [scaled.outputs[0], matrix], {}, f"{name}.weight", ir.DataType.FLOAT)
    return [low, high, *pair, both, wide, split, elements, exponents, factors, spread, scaled, whole]


def _node(
    op: str, inputs: list[ir.Value], attributes: dict[str, Any], name: str, dtype: ir.DataType | None = None
) -> ir.Node:
    output = ir.Value(name=name, type=None if dtype is None else ir.TensorType(dtype))
    return ir.node(op, inputs, attributes, outputs=[output])


def _initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(
        name=tensor.name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
    )
    graph.initializers[str(tensor.name)] = value
    return value
