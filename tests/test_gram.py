"""Gram matrices of a small random Llama against those of transformers' own activations, gathered by hooks."""

import pytest
import torch
from family_configs import random_model
from torch.testing import assert_close
from transformers import LlamaConfig

from specqd.frontends.huggingface import capture
from specqd.passes import Pipeline
from specqd.passes.match import weight_of
from specqd.passes.quantize.cast_mxfp4 import decide
from specqd.passes.quantize.gram import grams

CONFIG = LlamaConfig(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
PIPELINE = "fuse-rms-norm, fuse-rope, fuse-linear, insert-kv-cache{dtype=float32}"


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG).float()


@pytest.fixture(scope="module")
def program(model):
    return Pipeline.parse(PIPELINE)(capture(model))


@pytest.fixture
def texts(rng):
    return [torch.randint(97, (length,), generator=rng).tolist() for length in (40, 23, 2)]


def by_hooks(model, texts, names):
    """Sums of x x^T over all positions but the first, for the inputs of modules."""
    found = dict.fromkeys(names, 0)
    hooks = []
    for name in names:

        def add(_, args, name=name):
            rows = args[0][0, 1:].double()
            found[name] = found[name] + rows.T @ rows

        hooks.append(model.get_submodule(name).register_forward_pre_hook(add))
    with torch.no_grad():
        for text in texts:
            model(torch.tensor([text]))
    for hook in hooks:
        hook.remove()
    return found


def linears(program):
    return [node for node, form in decide(program, program.target, "keep", ()) if form == "mxfp4"]


def test_they_are_those_of_the_model(model, program, texts):
    modules = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    inputs = [f"model.layers.{i}.{module}" for i in (0, 1) for module in modules]
    expected = list(by_hooks(model, texts, inputs).values())
    got = [gram for _, gram in grams(program, program.target, linears(program), texts)]
    assert len(got) == len(expected) == 8
    for one, other in zip(got, expected, strict=True):
        # Float32 activations and sums of float32 products of 62 rows.
        assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.diagonal().max()))


def test_linears_that_share_an_input_share_a_gram(model, texts):
    apart = Pipeline.parse("insert-kv-cache{dtype=float32}")(capture(model))
    names = [[str(weight_of(n)).split(".")[-2] for n in nodes] for nodes, _ in
             grams(apart, apart.target, linears(apart), texts)]  # fmt: skip
    assert names == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]] * 2


def test_nothing_runs_after_the_last_linear(program, texts):
    cut = program.copy()
    wanted = linears(cut)[:2]
    for name in cut.used_weights():
        if "layers.1." in name:
            del cut.weights[name]
    assert [nodes for nodes, _ in grams(cut, cut.target, wanted, texts)] == [[node] for node in wanted]
