"""Every dense family, compiled with cache and draft, decoded step by step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from compiled import (
    EXTENDED,
    NATIVE,
    RUNNABLE,
    Compiled,
    lowered,
    random_tokens,
    threads,
    with_bf16_activations,
)
from family_configs import FAMILIES, FURTHER, MIXTURES, random_model
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from specqd.build import default_pipeline
from specqd.codegen.isa import TABLE
from specqd.errors import CodegenError
from specqd.frontends import capture
from specqd.passes import Pipeline
from specqd.program import Program
from specqd.reference import run

ops = torch.ops.specqd
LENGTH = 24
DENSE = [name for name in FAMILIES | FURTHER if name not in MIXTURES]


#: the families compiled in the default run: they have between them whatever codegen knows of any
SAMPLED = ("llama", "mistral", "gemma2", "gemma3_text", "phi", "gpt_neox", "smollm3", "cohere", "gpt2", "opt", "ctrl",
           "youtu")  # fmt: skip
COMPILED = [name if name in SAMPLED else pytest.param(name, marks=EXTENDED) for name in DENSE]
#: families whose rows are grouped in the default run too: blocks side by side, LayerNorms, learned positions
GROUPED = ("phi", "cohere", "gpt2")


def config(family: str) -> PretrainedConfig:
    """The family's tiny configuration, with a stream of 96 channels: blocks of 32 are what MXFP4 casts."""
    made = (FAMILIES | FURTHER)[family]()
    setattr(made, "n_embd" if family == "gpt2" else "hidden_size", 96)
    if getattr(made, "head_dim", None) == 48 // 6:
        made.head_dim = 96 // 6
    if family == "gemma3_text":  # its four layers make no loop, and so take a minute
        made.num_hidden_layers, made.layer_types = 3, made.layer_types[:3]
    return made


@dataclass(frozen=True)
class Family:
    """A compiled family, the tokens fed to it, and the logits it gave for them one at a time."""

    name: str
    compiled: Compiled
    model: PreTrainedModel
    tokens: list[int]
    target: np.ndarray
    draft: np.ndarray

    @property
    def program(self) -> Program:
        return self.compiled.program


@pytest.fixture(scope="module", params=COMPILED)
def family(request: pytest.FixtureRequest) -> Iterator[Family]:
    name = request.param
    model = random_model(config(name))
    steps = ("conv1d-to-linear, " if name == "gpt2" else "") + default_pipeline(32)
    # Activations stay float32 there, so that nothing but the cache is rounded.
    exact = next(isa for isa in RUNNABLE if not TABLE[isa].pairs)
    made = Compiled(Pipeline.parse(steps)(capture(model)), exact)
    tokens = random_tokens(made.program, LENGTH, torch.Generator().manual_seed(8))
    with threads(
        2
    ):  # two threads show races, most of all in the many phases that one row gives to one of them
        yield Family(
            name, made, model, tokens, *(made.decode(entry, tokens, 1) for entry in ("target", "draft"))
        )


def reference(program: Program, entry: str, tokens: list[int]) -> np.ndarray:
    return run(program, program.entries[entry], torch.tensor([tokens]))[0].numpy()


def assert_near(got: np.ndarray, wanted: np.ndarray, *, usual: float, largest: float) -> None:
    assert wanted.std() > 0.4, "the weights are too small for this comparison to mean anything"
    error = np.abs(got - wanted)
    assert np.median(error) < usual and error.max() < largest, (
        f"median {np.median(error)}, most {error.max()}"
    )


def test_target_gives_the_logits_of_transformers(family: Family) -> None:
    """In float32 but for keys and values, which the cache holds in BF16: 2^-9 of each."""
    eager = family.model.float()
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        wanted = eager(torch.tensor([family.tokens]), use_cache=False).logits[0].numpy()
    # Nemotron squares its activations, and so doubles what they are off by.
    assert_near(family.target, wanted, usual=0.01, largest=0.2 if family.name == "nemotron" else 0.1)


def test_target_gives_the_logits_of_the_reference(family: Family) -> None:
    """The reference's cache is BF16 too. Now and then a key or value between two of them is rounded otherwise."""
    assert_near(family.target, reference(family.program, "target", family.tokens), usual=2e-4, largest=0.01)


@pytest.mark.skipif(not NATIVE.pairs, reason="this CPU does not multiply pairs of BF16")
@pytest.mark.parametrize("entry", ["target", "draft"])
def test_bf16_products_give_the_logits_of_a_reference_with_bf16_activations(
    family: Family, entry: str
) -> None:
    """An activation between two BF16 numbers that is rounded otherwise moves what follows by 2^-9 of itself."""
    program = with_bf16_activations(family.program, entry)
    if entry == "draft":
        program = with_int8_activations(program)
    made = Compiled(family.program)
    with threads(2):
        got = made.decode(entry, family.tokens, 1)
    # OLMo2 normalises what comes out of its blocks, and so each rounding.
    usual = 0.02 if family.name == "olmo2" else 0.01
    assert_near(got, reference(program, entry, family.tokens), usual=usual, largest=0.15)


def int8_rounded(x: Tensor) -> Tensor:
    """What integer kernels make of their input: INT8 in blocks of 32, symmetric."""
    blocks = F.pad(x, (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.full_like(largest, 127) / largest.clamp_min(1e-30)
    return ((blocks * inverse).round() * (largest * (1 / 127))).flatten(-2)[..., : x.shape[-1]]


def with_int8_activations(program: Program) -> Program:
    rounded = program.copy()
    graph = rounded.entries["draft"].graph
    cast = [n for n in graph.nodes if n.target in (ops.linear_mxfp4.default, ops.linear_int8.default)]
    assert sum(n.target is ops.linear_mxfp4.default for n in cast) >= 3
    for node in cast:
        with graph.inserting_before(node):
            node.update_arg(0, graph.call_function(int8_rounded, (node.args[0],)))
    return rounded


def test_draft_gives_the_logits_of_the_reference_with_rounded_activations(family: Family) -> None:
    rounded = with_int8_activations(family.program)
    # A number between two integers that is rounded otherwise moves everything after it, in OLMo2 much: it
    # normalises what comes out of its blocks.
    usual = {"olmo2": 0.02, "gpt_bigcode": 5e-3}.get(family.name, 2e-3)
    assert_near(family.draft, reference(rounded, "draft", family.tokens), usual=usual, largest=0.3)
    assert_near(family.draft, reference(family.program, "draft", family.tokens), usual=0.05, largest=1.0)


EVERY_DENSE = [name if name in GROUPED else pytest.param(name, marks=EXTENDED) for name in DENSE]


@pytest.mark.parametrize("family", EVERY_DENSE, indirect=True)
def test_three_rows_of_the_target_have_the_bits_of_one(family: Family) -> None:
    assert np.array_equal(family.compiled.decode("target", family.tokens, 3), family.target)


@pytest.mark.parametrize("family", [pytest.param(name, marks=EXTENDED) for name in DENSE], indirect=True)
def test_three_rows_of_the_draft_have_the_bits_of_one(family: Family) -> None:
    assert np.array_equal(family.compiled.decode("draft", family.tokens, 3), family.draft)


@pytest.mark.parametrize(
    ("name", "operator", "place"),
    [
        ("mixtral", "aten.softmax", "layers.0.mlp"),
        pytest.param("qwen2_moe", "aten.softmax", "layers.0.mlp", marks=EXTENDED),
        pytest.param("qwen3_moe", "aten.softmax", "layers.0.mlp", marks=EXTENDED),
        pytest.param("olmoe", "aten.softmax", "layers.0.mlp", marks=EXTENDED),
        pytest.param("gpt_oss", "aten.topk", "layers.0.mlp", marks=EXTENDED),
    ],
)
def test_mixtures_are_refused_by_operator_and_place(name: str, operator: str, place: str) -> None:
    assert name in MIXTURES
    program = Pipeline.parse("insert-kv-cache{capacity=32}")(capture(random_model(FAMILIES[name]())))
    with pytest.raises(CodegenError) as refused:
        lowered(program, "target", 1)
    assert operator in str(refused.value) and place in str(refused.value)
    assert "specqd explain" in str(refused.value)


def test_every_mixture_is_tried() -> None:
    assert {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"} == MIXTURES
