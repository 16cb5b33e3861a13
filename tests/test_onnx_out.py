"""Programs that become ONNX models: the same numbers in onnx's own evaluator, in onnxruntime, and read back."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from small_programs import DIM, VOCAB, Decoder, of
from torch import nn

import specqd
import specqd.ops
from specqd.errors import ContractError, InputError

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}

heads = torch.ops.specqd


def body(module, x, positions):
    """A norm, and attention of four heads to two of keys, that see three positions."""
    y = heads.rms_norm(x, module.norm, 1e-5, 1.0)
    q, k, v = (part(y).unflatten(-1, (-1, 16)).transpose(1, 2) for part in (module.q, module.k, module.v))
    angles = positions[..., None] * torch.cat([module.rates, module.rates])
    q, k = (heads.rope(part, angles.cos(), angles.sin()) for part in (q, k))
    mixed = heads.causal_attention(q, k, v, 0.25, 0, 3, 20.0, None)
    return x + module.out(mixed.flatten(2))


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    members = {
        name: nn.Linear(DIM, n, bias=name == "q")
        for name, n in (("q", 64), ("k", 32), ("v", 32), ("out", DIM))
    }
    decoder = Decoder(body, norm=torch.rand(DIM), rates=torch.tensor([1.0, 0.1, 0.03, 0.01]), **members)
    return of(decoder.eval())


def runs_as(path, program, entry="target", *, runtime: bool = True) -> None:
    """Compare a file with the reference on a length that was no example, everywhere it can run."""
    model = onnx.load(path)
    onnx.checker.check_model(model)
    tokens, positions = torch.arange(9)[None] % VOCAB, torch.arange(9)[None]
    wanted = specqd.reference.run(program, program.entry(entry), tokens).numpy()
    given = dict(zip([i.name for i in model.graph.input], (tokens.numpy(), positions.numpy()), strict=True))
    np.testing.assert_allclose(ReferenceEvaluator(model).run(None, given)[0], wanted, **TOLERANCE)
    np.testing.assert_allclose(specqd.capture(path).module()(tokens, positions), wanted, **TOLERANCE)
    if runtime:
        onnxruntime = pytest.importorskip("onnxruntime")
        options = onnxruntime.SessionOptions()
        if entry == "draft":  # its own rewrites round what is multiplied by quantised weights to INT8
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(path, options)
        np.testing.assert_allclose(session.run(None, given)[0], wanted, **TOLERANCE)


def test_attention_norms_and_rope_are_onnx_operators(program, tmp_path):
    path = specqd.export_onnx(program, tmp_path / "net.onnx", lowered=True)
    runs_as(path, program)
    model = onnx.load(path)
    kinds = {node.op_type for node in model.graph.node}
    assert {"Attention", "RMSNormalization"} <= kinds and {n.domain for n in model.graph.node} <= {""}
    assert not any(node.metadata_props for node in model.graph.node)


def test_mxfp4_weights_are_onnxs_own_types(program, tmp_path):
    cast = specqd.Pipeline.parse("derive-draft, draft: cast-mxfp4")(program)
    path = specqd.export_onnx(cast, tmp_path / "net.onnx", "draft")
    runs_as(path, cast, "draft", runtime=False)
    types = {one.name: one.data_type for one in onnx.load(path).graph.initializer}
    assert {TensorProto.FLOAT4E2M1, TensorProto.FLOAT8E8M0} <= set(types.values())


@pytest.mark.parametrize("step", ["cast-mxfp4", pytest.param("cast-int8", marks=pytest.mark.extended)])
def test_what_is_lowered_runs_today(program, tmp_path, step):
    cast = specqd.Pipeline.parse(f"derive-draft, draft: {step}")(program)
    path = specqd.export_onnx(cast, tmp_path / "net.onnx", "draft", lowered=True)
    runs_as(path, cast, "draft")
    assert path.stat().st_size < 4 * sum(w.numel() for w in program.weights.values())


def test_a_module_makes_the_round_trip(tmp_path, rng):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 5)
    )
    example = torch.randn(2, 3, 8, 8, generator=rng)
    program = specqd.capture(net, (example,), ({0: torch.export.Dim("batch")},))
    path = specqd.export_onnx(program, tmp_path / "net.onnx")
    back, x = specqd.capture(path), torch.randn(4, 3, 8, 8, generator=rng)
    assert back.target.inputs[0].dynamic == (0,)
    torch.testing.assert_close(back.module()(x), net.eval()(x), **TOLERANCE)
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(got, net(x).detach().numpy(), **TOLERANCE)


def test_what_onnx_lacks_is_refused_with_what_to_do(program, tmp_path):
    cached = specqd.Pipeline.parse("insert-kv-cache{capacity=16}")(program)
    with pytest.raises(
        ContractError, match="a cache, which ONNX models do not hold; export before insert-kv-cache"
    ):
        specqd.export_onnx(cached, tmp_path / "net.onnx")
    (tmp_path / "taken.onnx").touch()
    for path in (tmp_path / "taken.onnx", tmp_path / "no" / "net.onnx"):
        with pytest.raises(InputError, match="give the path of a new file"):
            specqd.export_onnx(program, path)
    with pytest.raises(InputError, match="has no entry 'draft'"):
        specqd.export_onnx(program, tmp_path / "net.onnx", "draft")
