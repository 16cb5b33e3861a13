"""ONNX files that are damaged or hostile end in one sentence, before there is memory or time for them."""

import contextlib
import random
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import specqd
from specqd.errors import CaptureError, InputError, SpecqdError

FLOAT = TensorProto.FLOAT


def info(name: str, shape=(2,), kind=FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def model(nodes, inputs=None, outputs=None, tensors=(), opset=21) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "net", inputs or [info("x")], outputs or [info("y")], list(tensors))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


RELU = helper.make_node("Relu", ["x"], ["y"])
ADD = helper.make_node("Add", ["x", "w"], ["y"])


def saved(tmp_path: Path, proto) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(proto if isinstance(proto, bytes) else proto.SerializeToString())
    return path


def tensor(**changes) -> TensorProto:
    one = numpy_helper.from_array(np.ones(2, np.float32), "w")
    for key, value in changes.items():
        if key == "dims":
            one.dims[:] = value
        else:
            setattr(one, key, value)
    return one


def external(location: str, **more) -> TensorProto:
    one = TensorProto(name="w", data_type=FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **more}.items():
        entry = one.external_data.add()
        entry.key, entry.value = key, str(value)
    return one


CASES = {
    "empty": (b"", "holds no graph"),
    "text": (b"this is no protobuf", "no ONNX model, or damaged"),
    "cut off": (model([RELU]).SerializeToString()[:-7], "no ONNX model, or damaged"),
    "cycle": (model([helper.make_node("Add", ["x", "b"], ["a"]), helper.make_node("Relu", ["a"], ["b"]),
                     helper.make_node("Relu", ["a"], ["y"])]), "there is a cycle"),
    "lost input": (model([ADD]), r"'y' \(Add\) reads 'w', which nothing gives"),
    "lost output": (model([RELU], outputs=[info("z")]), "gives 'z', which nothing in it computes"),
    "two of a name": (model([RELU, helper.make_node("Exp", ["x"], ["y"])]), "two nodes give 'y'"),
    "negative size": (model([ADD], tensors=[tensor(dims=[-2])]), r"impossible shape \[-2\]"),
    "huge size": (model([ADD], tensors=[tensor(dims=[1 << 40, 1 << 40])]), "impossible shape"),
    "less than it says": (model([ADD], tensors=[tensor(dims=[1 << 30])]), "4294967296 bytes, and holds 8"),
    "more than it says": (model([ADD], tensors=[TensorProto(
        name="w", data_type=TensorProto.INT32, dims=[2], int32_data=range(8))]), "holds 8 elements"),
    "nibbles apart": (model([ADD], tensors=[TensorProto(
        name="w", data_type=TensorProto.INT4, dims=[2], int32_data=[1, 2])]), "holds 2 elements"),
    "huge input": (model([RELU], [info("x", (1 << 30, 1 << 30))]), "more than memory holds"),
    "impossible input": (model([RELU], [info("x", (1 << 40,))]), "impossible size 1099511627776"),
    "unknown type": (model([ADD], tensors=[tensor(data_type=77)]), "type number 77"),
    "outside": (model([ADD], tensors=[external("../w.bin")]), "outside of the model's folder"),
    "absolute": (model([ADD], tensors=[external("/etc/hostname")]), "outside of the model's folder"),
    "name too long": (model([ADD], tensors=[external("a" * 5000)]), "which is no path"),
    "name with a null": (model([ADD], tensors=[external("x\0y")]), "which is no path"),
    "not there": (model([ADD], tensors=[external("w.bin")]), "which is not in"),
    "no number": (model([ADD], tensors=[external("model.onnx", offset="x")]), "is no number"),
    "beyond the end": (model([ADD], tensors=[external("model.onnx", offset=10**12)]), "cut off or another's"),
    "attribute without a type": (model([helper.make_node("Relu", ["x"], ["y"], name="r")]), None),
}  # fmt: skip
_odd = CASES["attribute without a type"][0]
_odd.graph.node[0].attribute.add().name = "axis"
CASES["attribute without a type"] = (_odd, "'axis' has no type")


@pytest.mark.parametrize("name", CASES)
def test_damaged_files(tmp_path, name):
    proto, why = CASES[name]
    with pytest.raises((InputError, CaptureError), match=why):
        specqd.capture(saved(tmp_path, proto))


def test_missing_paths(tmp_path):
    for path, why in ((tmp_path / "no.onnx", "does not exist"), (tmp_path / "dir.onnx", "is a folder")):
        (tmp_path / "dir.onnx").mkdir(exist_ok=True)
        with pytest.raises(InputError, match=why):
            specqd.capture(path)


def test_external_data_is_read_beside_the_model_and_not_through_links(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "secret.bin").write_bytes(np.ones(2, np.float32).tobytes())
    (home / "w.bin").write_bytes(np.array([7, 1, 2], np.float32).tobytes())
    program = specqd.capture(saved(home, model([ADD], tensors=[external("w.bin", offset=4, length=8)])))
    assert program.weights["w"].tolist() == [1, 2]
    (home / "link.bin").symlink_to(tmp_path / "secret.bin")
    with pytest.raises(InputError, match="outside of the model's folder"):
        specqd.capture(saved(home, model([ADD], tensors=[external("link.bin")])))
    with pytest.raises(InputError, match="give the model's path"):
        specqd.capture(model([ADD], tensors=[external("w.bin")]))


def test_little_that_grows_is_not_computed(tmp_path):
    """A few bytes that stand for 8 terabytes."""
    shape = numpy_helper.from_array(np.array([1 << 20, 1 << 20]), "s")
    nodes = [
        helper.make_node("ConstantOfShape", ["s"], ["big"]),
        helper.make_node("Add", ["x", "big"], ["y"]),
    ]
    with pytest.raises(CaptureError, match="GB of constants"):
        specqd.capture(model(nodes, tensors=[shape]))


@pytest.mark.parametrize("shapes", [((1 << 15, 1), (1, 1 << 15)), ((1 << 20,), (1 << 20,))])
def test_constants_that_grow_by_what_they_meet_are_not_computed(shapes):
    """Thousands of numbers that broadcast to billions; or that are joined to themselves, again and again."""
    tensors = [
        numpy_helper.from_array(np.ones(shape, np.float32), name)
        for name, shape in zip("ab", shapes, strict=True)
    ]
    nodes = [helper.make_node("Mul", ["a", "b"], ["0"])]
    nodes += [helper.make_node("Concat", [str(n)] * 2, [str(n + 1)], axis=0) for n in range(20)]
    nodes += [helper.make_node("Add", ["x", "20"], ["y"])]
    with pytest.raises(CaptureError, match="GB of constants"):
        specqd.capture(model(nodes, tensors=tensors))


def test_loops_without_an_end_are_not_unrolled():
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Relu", ["h"], ["k"])],
        "body",
        [info("i", (), TensorProto.INT64), info("c", (), TensorProto.BOOL), info("h")],
        [info("d", (), TensorProto.BOOL), info("k")],
    )
    nodes = [helper.make_node("Loop", ["n", "", "x"], ["y"], body=body)]
    count = numpy_helper.from_array(np.array(1 << 40), "n")
    with pytest.raises(CaptureError, match="rounds, which are not unrolled"):
        specqd.capture(model(nodes, tensors=[count]))


def test_a_function_that_calls_itself():
    function = helper.make_function(
        "own", "f", ["a"], ["b"], [helper.make_node("f", ["a"], ["b"], domain="own")],
        [helper.make_opsetid("", 21), helper.make_opsetid("own", 1)],
    )  # fmt: skip
    proto = model([helper.make_node("f", ["x"], ["y"], domain="own")])
    proto.functions.append(function)
    proto.opset_import.append(helper.make_opsetid("own", 1))
    with pytest.raises(CaptureError, match="functions call each other"):
        specqd.capture(proto)


def test_functions_that_double(monkeypatch):
    """Twenty functions, each of which calls the next one twice, are a million nodes."""
    from specqd.frontends.onnx import running

    monkeypatch.setattr(running, "_NODES", 1000)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("own", 1)]
    proto = model([helper.make_node("f0", ["x"], ["y"], domain="own")])
    for n in range(20):
        calls = [helper.make_node(f"f{n + 1}", [a], [b], domain="own") for a, b in ("at", "tb")]
        proto.functions.append(helper.make_function("own", f"f{n}", ["a"], ["b"], calls, opsets))
    last = [helper.make_node("Relu", ["a"], ["b"])]
    proto.functions.append(helper.make_function("own", "f20", ["a"], ["b"], last, opsets))
    proto.opset_import.append(opsets[1])
    with pytest.raises(CaptureError, match="more than 1000 nodes run"):
        specqd.capture(proto)


def test_a_sample_of_damaged_files(tmp_path):
    """What the suite onnx-fuzz of benchmarks/coverage.py does with thousands."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
    try:
        from fuzz_onnx import damaged
    finally:
        sys.path.pop(0)
    seeds = [proto.SerializeToString() for proto, _ in CASES.values() if not isinstance(proto, bytes)]
    rng = random.Random(0)
    for _ in range(150):
        with contextlib.suppress(SpecqdError):
            specqd.capture(saved(tmp_path, damaged(rng.choice(seeds), rng)))
