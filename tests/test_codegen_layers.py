"""The loop over layers: what it is found in, and that it changes no bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from compiled import EXTENDED, Compiled, lowered, random_tokens
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen2Config, SmolLM3Config

from specqd.build import default_pipeline
from specqd.codegen.lower import function, layers
from specqd.codegen.pack import Packed
from specqd.frontends import capture
from specqd.passes import Pipeline
from specqd.program import Program

SLIDING, FULL = "sliding_attention", "full_attention"


def config(kind: type[PretrainedConfig], layers: int, **changes: Any) -> PretrainedConfig:
    return kind(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **changes,
    )


def windows(*types: str) -> PretrainedConfig:
    """Layers that see the last four positions, or all."""
    return config(Qwen2Config, len(types), use_sliding_window=True, sliding_window=4, layer_types=list(types))


#: configuration, and the attention layers of each iteration of the loop that must be found (None: no loop)
MODELS: dict[str, tuple[PretrainedConfig, list[list[int]] | None]] = {
    "one": (windows(FULL), None),
    "alternating and a rest": (windows(SLIDING, FULL, SLIDING, FULL, SLIDING), [[0, 1], [2, 3]]),
    "first and last differ": (windows(FULL, SLIDING, SLIDING, FULL), [[1], [2]]),
    "some without rope": (config(SmolLM3Config, 4, no_rope_layers=[1, 0, 1, 0]), [[0, 1], [2, 3]]),
}


@pytest.fixture(scope="module")
def captured() -> dict[str, Program]:
    made = {}
    for name, (model, _) in MODELS.items():
        with torch.random.fork_rng():
            torch.manual_seed(12)
            weights = AutoModelForCausalLM.from_config(model, dtype=torch.bfloat16).eval()
            for parameter in weights.parameters():
                torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.25)
        made[name] = capture(weights)
    return made


@pytest.fixture(scope="module")
def programs(captured: dict[str, Program]) -> dict[str, Program]:
    return {name: Pipeline.parse(default_pipeline(32))(program) for name, program in captured.items()}


def attentions(body: tuple[torch.fx.Node, ...]) -> list[int]:
    """The layers whose attention is in a body."""
    return [int(n.args[layers.LAYER_ARGUMENT]) for n in body if "cached_attention" in str(n.target)]


@pytest.mark.parametrize("entry", ["target", "draft"])
@pytest.mark.parametrize("name", MODELS)
def test_the_longest_run_of_alike_layers_becomes_the_loop(
    name: str, entry: str, programs: dict[str, Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    find_loop = function.find_loop
    monkeypatch.setattr(function, "find_loop", lambda nodes: found.append(find_loop(nodes)) or found[-1])
    lowered(programs[name], entry, 3)
    loop = found[0]
    assert (loop and [attentions(body) for body in loop.bodies]) == MODELS[name][1]


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("first and last differ", "draft"),
        pytest.param("alternating and a rest", "target", marks=EXTENDED),
        pytest.param("first and last differ", "target", marks=EXTENDED),
        pytest.param("alternating and a rest", "draft", marks=EXTENDED),
        pytest.param("some without rope", "target", marks=EXTENDED),
    ],
)
def test_a_loop_gives_the_bits_of_layers_written_out(
    name: str, entry: str, programs: dict[str, Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = random_tokens(programs[name], 24, torch.Generator().manual_seed(13))
    rolled = Compiled(programs[name]).decode(entry, tokens, 2)
    monkeypatch.setattr(function, "find_loop", lambda nodes: None)
    written_out = Compiled(programs[name]).decode(entry, tokens, 2)
    assert np.array_equal(rolled, written_out)
    assert rolled.std() > 0.1


@pytest.mark.parametrize("name", ["alternating and a rest", "first and last differ"])
def test_every_weight_of_a_layer_is_packed_once(name: str, programs: dict[str, Program]) -> None:
    """Alike layers of a loop are stacked in one array; the others have arrays of their own."""
    packed = [p.packed for p in lowered(programs[name], "target", 1).parameters if p.packed is not None]
    down = [p.sources for p in packed if "down_proj" in p.sources[0]]
    layers = MODELS[name][0].num_hidden_layers
    assert sorted(source for sources in down for source in sources) == [
        f"model.layers.{i}.mlp.down_proj.weight" for i in range(layers)
    ]
    assert max(len(sources) for sources in down) == len(MODELS[name][1] or [])


def test_stacks_of_other_layers_have_other_names() -> None:
    """Two functions may stack 0, 1, 2 and 0, 2, 4: the artifact holds both."""
    stacks = [tuple(f"layers.{i}.norm.weight" for i in layers) for layers in ((0, 1, 2), (0, 2, 4), (0,))]
    assert len({Packed(sources, "flat", "float32", 8).name for sources in stacks}) == 3


def test_a_loop_is_found_without_the_fusions(captured: dict[str, Program]) -> None:
    """Then a layer has many more nodes, and both branches of each residual go around them."""
    plain = Pipeline.parse("insert-kv-cache{capacity=32}")(captured["some without rope"])
    packed = [p.packed for p in lowered(plain, "target", 1).parameters if p.packed is not None]
    assert sorted(len(p.sources) for p in packed if "down_proj" in p.sources[0]) == [2, 2]
