"""Types of ONNX that torch does not compute in, against ml_dtypes and torch's own conversions."""

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, parser

import specqd
from specqd.frontends.onnx.coded import decode, encode


def model(body: str) -> onnx.ModelProto:
    return parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\n{body}')


@pytest.mark.parametrize(
    "kind", [TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT4E2M1]
)
def test_small_types_are_constants_and_codes(kind):
    numbers = [0, 1, 2, 3, 4, 6]
    w = helper.make_tensor("w", kind, [6], numbers)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [6])
    outputs = [
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [6]),
        helper.make_tensor_value_info("c", kind, [6]),
    ]
    nodes = [
        helper.make_node("Cast", ["w"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["f", "x"], ["y"]),
        helper.make_node("Cast", ["x"], ["c"], to=kind),
    ]
    proto = helper.make_model(
        helper.make_graph(nodes, "net", [x], outputs, [w]), opset_imports=[helper.make_opsetid("", 23)]
    )
    y, codes = specqd.capture(proto).module()(torch.tensor(numbers, dtype=torch.float32))
    assert y.tolist() == [n * n for n in numbers]
    wanted = onnx.numpy_helper.to_array(w)
    held = wanted.view(np.uint8) if "float" in wanted.dtype.name else wanted.astype(np.int8)
    assert codes.tolist() == held.tolist()


@pytest.mark.parametrize(
    "name", ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float4_e2m1fn"]
)
@pytest.mark.parametrize("saturate", [True, False])
def test_small_floats_are_rounded_as_ml_dtypes_rounds_them(name, saturate):
    """All numbers of a type, what lies between and beside those, and what is too large."""
    dtype = np.dtype(getattr(ml_dtypes, name))
    values = np.arange(16 if "4_" in name else 256, dtype=np.uint8).view(dtype).astype(np.float32)
    finite = np.unique(values[np.isfinite(values)])
    near = np.concatenate([finite, (finite[1:] + finite[:-1]) / 2, finite * 2])
    x = np.concatenate(
        [near, np.nextafter(near, np.inf), np.nextafter(near, -np.inf), [-0.0, np.inf, np.nan]]
    )
    x = x.astype(np.float32)
    bounded = np.where(np.isnan(x), x, x.clip(finite[0], finite[-1])) if saturate else x
    kind = helper.np_dtype_to_tensor_dtype(dtype)
    got = encode(torch.from_numpy(x), kind, saturate=saturate)
    assert got.codes.tolist() == bounded.astype(dtype).view(np.uint8).tolist()
    if hasattr(torch, name):
        assert torch.equal(
            decode(got).nan_to_num(7), got.codes.view(getattr(torch, name)).float().nan_to_num(7)
        )


def test_bfloat16_is_rounded_over_its_whole_range(tmp_path, rng):
    bits = torch.randint(-(1 << 31), 1 << 31, (4096,), generator=rng).to(torch.int32)
    x = bits.view(torch.float32).nan_to_num()
    proto = model("net (float[4096] x) => (float[4096] y) { b = Cast<to=16>(x)  y = Cast<to=1>(b) }")
    program = specqd.capture(proto)
    assert torch.equal(program.module()(x), x.bfloat16().float())
    specqd.compile(program, tmp_path / "net")
    assert torch.equal(torch.as_tensor(specqd.load(tmp_path / "net")(x)), x.bfloat16().float())


def test_unsigned_integers_keep_their_bits():
    proto = model("net (uint32[3] x) => (uint64[3] y, uint16[3] z) { y = Cast<to=13>(x)  z = Cast<to=4>(x) }")
    y, z = specqd.capture(proto).module()(torch.tensor([16777217, 4294967295, 65537]))
    assert y.tolist() == [16777217, 4294967295, 65537] and z.tolist() == [1, 65535, 1]
