"""ONNX models that become Programs: numerics against onnx's own evaluator, sizes that stay open, what is refused."""

import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import parser
from onnx.reference import ReferenceEvaluator

import specqd
from specqd.cli import main
from specqd.errors import CaptureError, InputError

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def model(body: str, opset: int = 21, ir: int = 10) -> onnx.ModelProto:
    return parser.parse_model(f'<ir_version: {ir}, opset_import: ["" : {opset}]>\n{body}')


def expected(proto: onnx.ModelProto, *arrays: np.ndarray) -> list[np.ndarray]:
    names = [one.name for one in proto.graph.input]
    return ReferenceEvaluator(proto).run(None, dict(zip(names, arrays, strict=True)))


def close(got, wanted) -> None:
    got = got if isinstance(got, tuple) else (got,)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(np.asarray(a), b, **TOLERANCE)


MLP = """
net (float[batch, 3, n] x, float[n, 4] z) => (float[batch, k] y)
<float[4] w = {1.0, 2.0, 3.0, 4.0}>
{
    squares = Mul(w, w)
    product = MatMul(x, z)
    sum = Add(product, squares)
    shape = Shape(sum)
    first = Constant<value_ints=[0]>()
    batch = Gather(shape, first)
    rest = Constant<value_ints=[-1]>()
    wanted = Concat<axis=0>(batch, rest)
    flat = Reshape(sum, wanted)
    y = Gelu(flat)
}
"""


def test_shapes_are_folded_and_named_sizes_stay_open(tmp_path, rng):
    proto = model(MLP)
    onnx.save(proto, tmp_path / "net.onnx")
    program = specqd.capture(tmp_path / "net.onnx")
    assert [str(i) for i in program.target.inputs] == ["x float32 [?, 3, ?]", "z float32 [?, 4]"]
    targets = [str(n.target) for n in program.target.graph.nodes if n.op == "call_function"]
    assert targets == [
        "aten.sym_size.int", "aten.matmul.default", "aten.add.Tensor", "aten.reshape.default", "aten.gelu.default",
    ]  # fmt: skip
    assert program.weights["squares"].tolist() == [1, 4, 9, 16]
    specqd.compile(program, tmp_path / "net")
    for batch, n in ((2, 4), (3, 9), (1, 1)):
        x = torch.randn(batch, 3, n, generator=rng).numpy(), torch.randn(n, 4, generator=rng).numpy()
        close(specqd.load(tmp_path / "net")(*x), expected(proto, *x))
        close(specqd.reference.run(program, program.target, *map(torch.from_numpy, x)), expected(proto, *x))


def test_sizes_are_fixed_by_name(tmp_path):
    program = specqd.capture(model(MLP), dynamic_shapes={"batch": 1})
    assert str(program.target.inputs[0]) == "x float32 [1, 3, ?]"
    for wrong, why in (
        ({"height": 2}, "it names batch, n"),
        ({"batch": -1}, "a number or"),
        (3, "by the names"),
    ):
        with pytest.raises(InputError, match=why):
            specqd.capture(model(MLP), dynamic_shapes=wrong)


RESHAPE = "net (float[2, 6] x, int64[2] shape) => (float[a, b] y) { y = Reshape(x, shape) }"


def test_an_input_may_be_a_value():
    program = specqd.capture(model(RESHAPE), (torch.zeros(2, 6), [3, -1]))
    assert [i.name for i in program.target.inputs] == ["x"]
    assert program.module()(torch.arange(12.0).reshape(2, 6)).shape == (3, 4)
    with pytest.raises(
        CaptureError, match=r"node 'y' \(Reshape\): its input 'shape' decides .* list of numbers"
    ):
        specqd.capture(model(RESHAPE))
    with pytest.raises(InputError, match="cannot always be"):
        specqd.capture(model(RESHAPE), (torch.zeros(2, 6), ["a"]))


@pytest.mark.parametrize(
    ("value", "why"),
    [([2], "cannot always be"), (np.zeros((2, 6), ml_dtypes.bfloat16), "example is ndarray"),
     (np.zeros((2, 6), "S1"), "example is ndarray"), (np.zeros((2, 5), np.float32), "example is .*2, 5")],
)  # fmt: skip
def test_examples_have_the_type_and_the_shape_of_the_input(value, why):
    with pytest.raises(InputError, match=why):
        specqd.capture(model(RESHAPE), (value, [3, -1]))


def test_an_array_without_dimensions_is_an_example():
    program = specqd.capture(model("net (float x) => (float y) { y = Relu(x) }"), (np.array(2, np.float32),))
    assert program.module()(torch.tensor(-1.0)) == 0


def test_sizes_are_divided_as_onnx_says(rng):
    """Half of `-n` is minus the smaller half of n, and not the larger one as in Python; fmod has the sign of `-n`."""
    proto = model(
        """
        net (float[n] x) => (int64 y, int64 z, int64 w, int64[2] v, int64 u, int64 t) {
            first = Constant<value_int=0>()  two = Constant<value_int=2>()  nine = Constant<value_int=9>()
            size = Shape(x)  n = Gather(size, first)
            minus = Neg(n)  y = Div(minus, two)  less = Sub(n, nine)  z = Div(less, two)
            twenty = Constant<value_int=20>()  w = Div(twenty, less)
            pair = Concat<axis=0>(size, size)  v = ReduceSum<noop_with_empty_axes=1>(pair)
            u = Mod<fmod=0>(less, two)  t = Mod<fmod=1>(less, two)
        }
        """
    )
    program = specqd.capture(proto)
    for n in (4, 7, 10, 12):
        x = torch.randn(n, generator=rng)
        close(program.module()(x), expected(proto, x.numpy()))


@pytest.mark.parametrize(("by", "exact"), [(0.5, True), (1.75, True), (0.7, False)])
def test_whole_numbers_of_sizes_are_those_of_float32(by, exact):
    """10 times the float32 next to 0.7 is less than 7, and in float32 it is 7; symbols are not rounded to float32."""
    proto = model(
        f"""
        net (float[n] x) => (int64 y) {{
            first = Constant<value_int=0>()  by = Constant<value_float={by}>()
            size = Shape(x)  n = Gather(size, first)
            real = Cast<to=1>(n)  some = Mul(real, by)  low = Floor(some)  y = Cast<to=7>(low)
        }}
        """
    )
    x = torch.zeros(10)
    assert specqd.capture(proto, dynamic_shapes={"n": 10}).module()(x) == expected(proto, x.numpy())[0]
    if exact:
        assert specqd.capture(proto).module()(x) == expected(proto, x.numpy())[0]
    else:
        with pytest.raises(CaptureError, match=r"scaled by 0.7, which is not exact in float32; fix the size"):
            specqd.capture(proto)


def test_nodes_may_be_in_any_order():
    proto = model("net (float[3] x) => (float[3] y) { a = Exp(x)  b = Neg(a)  y = Abs(b) }")
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes[::-1])
    assert specqd.capture(proto).module()(torch.zeros(3)).tolist() == [1, 1, 1]


def test_loops_and_branches_that_are_known_are_unrolled(rng):
    proto = model(
        """
        net (float[3] x) => (float[3] y, float[4, 3] all)
        <int64 rounds = {4}, bool yes = {1}>
        {
            y, all = Loop(rounds, yes, x) <body = step (int64 i, bool go, float[3] h)
                => (bool on, float[3] next, float[3] kept) {
                on = Identity(go)
                f = Cast<to=1>(i)
                next = If(go) <then_branch = a () => (float[3] p) { p = Add(h, f) },
                               else_branch = b () => (float[3] q) { q = Sub(h, f) }>
                kept = Identity(next)
            }>
        }
        """
    )
    x = torch.randn(3, generator=rng)
    program = specqd.capture(proto)
    close(program.module()(x), expected(proto, x.numpy()))
    assert not any("cond" in str(n.target) for n in program.target.graph.nodes)


def test_a_condition_that_is_computed_chooses_between_both_results(rng):
    proto = model(
        """
        net (bool c, float[3] x) => (float[3] y) {
            y = If(c) <then_branch = a () => (float[3] p) { p = Exp(x) },
                       else_branch = b () => (float[3] q) { q = Neg(x) }>
        }
        """
    )
    program, x = specqd.capture(proto), torch.randn(3, generator=rng)
    for c in (True, False):
        close(program.module()(torch.tensor(c), x), expected(proto, np.array(c), x.numpy()))


def test_functions_of_the_model_and_of_onnx_are_taken_apart(rng):
    proto = parser.parse_model(
        """
        <ir_version: 10, opset_import: ["" : 21, "own" : 1]>
        net (float[2, 3] x) => (float[2, 3] y) { t = own.scaled<factor=2.0>(x)
            y = MeanVarianceNormalization<axes=[1]>(t) }
        <domain: "own", opset_import: ["" : 21]>
        scaled <factor: float = 1.0> (a) => (b) { f = Constant<value_float: float = @factor>()  b = Mul(a, f) }
        """
    )
    x = torch.randn(2, 3, generator=rng)
    close(specqd.capture(proto).module()(x), expected(proto, x.numpy()))


def test_quantised_models_compile_to_the_same_integers(tmp_path, rng):
    proto = model(
        """
        net (float[2, 3, 8, 8] x) => (float[2, 4, 6, 6] y)
        <float xs = {0.05}, uint8 xz = {128}, float[4] ws = {0.01, 0.02, 0.03, 0.04}, int8[4] wz = {0, 0, 0, 0}>
        {
            q = QuantizeLinear(x, xs, xz)
            d = DequantizeLinear(q, xs, xz)
            v = DequantizeLinear<axis=0>(w, ws, wz)
            y = Conv(d, v)
        }
        """
    )
    w = torch.randint(-127, 128, (4, 3, 3, 3), generator=rng, dtype=torch.int8).numpy()
    proto.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    x = torch.randn(2, 3, 8, 8, generator=rng).numpy()
    program = specqd.capture(proto)
    assert program.weights["w"].dtype == torch.int8  # it is multiplied as it is
    specqd.compile(program, tmp_path / "net")
    close(specqd.load(tmp_path / "net")(x), expected(proto, x))


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (
            "net (float[2] x) => (float[2] y) { y = Nothing(x) }",
            r"'y' \(Nothing\): there is no such operator",
        ),
        ("net (float[2] x) => (float[2] y) { y = RandomUniformLike(x) }", "random numbers"),
        ("net (float[2] x) => (int64[a, b] y) { y = NonZero(x) }", "depends on the data"),
        ("net (string[2] x) => (string[2] y) { y = Identity(x) }", "of type STRING, which is not compiled"),
        (
            "net (seq(float[2]) x) => (float[2] y, int64 z) { z = SequenceLength(x)  y = Identity(z) }",
            "only tensors",
        ),
        ("net (float[2] x) => (float[2] y) { y = Concat(x) }", r"axis.*not defined so"),
        ("net (float[2, 3] x) => (float[2] y) { y = MatMul(x, x) }", r"'y' \(MatMul\)"),
    ],
)
def test_what_is_refused_names_the_node_and_why(body, why):
    with pytest.raises(CaptureError, match=why):
        specqd.capture(model(body))


def test_opsets_outside_the_range_are_refused():
    body = "net (float[2] x) => (float[2] y) { y = Relu(x) }"
    with pytest.raises(CaptureError, match=r"opset 12.*version_converter"):
        specqd.capture(model(body, opset=12, ir=7))
    newest = onnx.defs.onnx_opset_version()
    with pytest.raises(CaptureError, match=rf"opset {newest + 1}.*knows up to {newest}"):
        specqd.capture(model(body, opset=newest + 1))


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(one) for one in arguments])
    return ended.value.code


def test_the_command_line_compiles_and_explains_it(tmp_path, capsys):
    path = tmp_path / "net.onnx"
    onnx.save(model(MLP), path)
    assert run("compile", path, "-o", tmp_path / "net", "--size", "batch=2") == 0
    assert run("inspect", tmp_path / "net") == 0
    printed = capsys.readouterr().out
    assert "onnx, no language model" in printed and "x float32 [2, 3, " in printed
    assert run("explain", path, "fold-batch-norm") == 0
    assert "x aten.gelu" in capsys.readouterr().out
    assert run("compile", path, "-o", tmp_path / "other", "--size", "batch") == 2
    assert "write NAME=N" in capsys.readouterr().err


def test_without_onnx_there_is_a_hint(monkeypatch, tmp_path: Path):
    for name in [name for name in sys.modules if name.startswith("specqd.frontends.onnx")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError, match=r"pip install 'specqd\[onnx\]'"):
        specqd.capture(tmp_path / "net.onnx")
