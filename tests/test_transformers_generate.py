"""Artifacts inside transformers' `generate`: as `custom_generate`, and as the assistant of a model of the user's.

The oracle is transformers' own greedy decoding in float32 of the same BF16 weights, token for token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.generation import GenerateDecoderOnlyOutput

import specqd
from specqd.codegen import library
from specqd.errors import InputError
from specqd.frontends import Assistant, specqd_generate
from specqd.runtime.model import Model, load

VOCAB, CONTEXT = 61, 96


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in BF16, of a seed whose choices in these tests are no closer than 2^-8."""
    folder = tmp_path_factory.mktemp("generate") / "model"
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=VOCAB - 1,
        pad_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(51)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.15)
    model.bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def torch_model(checkpoint: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def artifact(checkpoint: Path) -> Model:
    folder = checkpoint.with_name("artifact")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "VERIFY_ROWS", (1, 4))
        patch.setattr(library, "PREFILL_ROWS", (32,))
        # Its activations are float32, as the oracle's, on every CPU.
        specqd.compile(checkpoint, folder, context=CONTEXT, isa="generic")
    return load(folder, sequences=2)


@pytest.fixture(scope="module")
def assistant(artifact: Model) -> Assistant:
    return Assistant(artifact)


@pytest.fixture
def prompts(rng: torch.Generator) -> Tensor:
    """int64 `[4, 9]`."""
    return torch.randint(2, VOCAB - 1, (4, 9), generator=rng)


class Streamer:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        assert not self.ended
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 40},
        {"max_length": 30},
        {"max_new_tokens": 1},
        {"max_new_tokens": 60, "eos_token_id": [*range(20, 26)]},
    ],
)
def test_a_compiled_model_generates_what_transformers_does(torch_model, artifact, prompts, options):
    expected = torch_model.generate(prompts, **options)
    made = torch_model.generate(prompts, **options, custom_generate=specqd_generate(artifact))
    assert torch.equal(made, expected)
    plain = torch_model.generate(prompts, **options, custom_generate=specqd_generate(artifact, plan="target"))
    assert torch.equal(plain, expected)


def test_prompts_of_different_length(torch_model, artifact, prompts):
    mask = torch.ones_like(prompts)
    for i in range(4):
        mask[i, : 2 * i] = 0
    options = {"attention_mask": mask, "max_new_tokens": 30, "eos_token_id": [20, 21, 22]}
    expected = torch_model.generate(prompts, **options)
    assert torch.equal(
        torch_model.generate(prompts, **options, custom_generate=specqd_generate(artifact)), expected
    )


def test_weights_of_the_model_are_not_needed(torch_model, artifact, prompts):
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(torch_model.config)
    made = shell.generate(prompts, max_new_tokens=20, custom_generate=specqd_generate(artifact))
    assert torch.equal(made, torch_model.generate(prompts, max_new_tokens=20))


def test_output_object_streamer_and_criteria(torch_model, artifact, prompts):
    one, asked = prompts[:1], []

    def seventeen_tokens(text: Tensor, scores: None, **_: Any) -> Tensor:
        asked.append(text.shape[1])
        return torch.tensor([text.shape[1] >= 17])

    streamer = Streamer()
    made = torch_model.generate(
        one,
        max_new_tokens=40,
        return_dict_in_generate=True,
        stopping_criteria=[seventeen_tokens],
        streamer=streamer,
        custom_generate=specqd_generate(artifact),
    )
    assert isinstance(made, GenerateDecoderOnlyOutput)
    assert torch.equal(made.sequences, torch_model.generate(one, max_new_tokens=8))
    assert asked == [*range(10, 18)]
    assert streamer.tokens == made.sequences[0].tolist() and streamer.ended


def filled_cache(model: LlamaForCausalLM) -> DynamicCache:
    return model(torch.tensor([[2]]), use_cache=True).past_key_values


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_sample": True, "top_k": 0}, "leave out do_sample=True$"),
        ({"do_sample": True, "temperature": 0.5, "top_k": 0}, "do_sample=True, TemperatureLogitsWarper$"),
        ({"num_beams": 3}, "leave out num_beams=3$"),
        ({"repetition_penalty": 1.2}, "RepetitionPenaltyLogitsProcessor$"),
        ({"min_new_tokens": 4}, "MinNewTokensLengthLogitsProcessor$"),
        ({"return_dict_in_generate": True, "output_scores": True}, "leave out output_scores=True$"),
        ({"streamer": Streamer()}, "a streamer takes one prompt, not 4"),
        ({"attention_mask": torch.tensor([[1] * 8 + [0]] * 4)}, "pad on the left"),
        ({"position_ids": torch.arange(1, 10)[None]}, "leave out position_ids"),
        ({"max_new_tokens": CONTEXT}, f"compile with `--context {CONTEXT + 9}`, or ask for fewer"),
        ({"eos_token_id": None, "pad_token_id": None, "stopping_criteria": ["row"]}, "give pad_token_id"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(torch_model, artifact, prompts, options, message):
    if "stopping_criteria" in options:
        first = prompts[0, 0]
        options = options | {"stopping_criteria": [lambda text, _: text[:, 0] == first]}
        torch_model.generation_config.pad_token_id = None
    options = {"max_new_tokens": 8} | options
    with pytest.raises(InputError, match=message):
        torch_model.generate(prompts, **options, custom_generate=specqd_generate(artifact))
    torch_model.generation_config.pad_token_id = 1


def test_caches_embeddings_and_other_models_are_refused(torch_model, artifact, prompts):
    generate = specqd_generate(artifact)
    one = prompts[:1]
    with pytest.raises(InputError, match="leave out past_key_values"):
        torch_model.generate(
            one, max_length=12, past_key_values=filled_cache(torch_model), custom_generate=generate
        )
    embeddings = torch_model.get_input_embeddings()(one)
    with pytest.raises(InputError, match="leave out inputs_embeds"):
        torch_model.generate(inputs_embeds=embeddings, max_new_tokens=2, custom_generate=generate)
    other = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=32, intermediate_size=8, num_hidden_layers=1)
    )
    with pytest.raises(InputError, match=r"has 61 tokens, that of LlamaForCausalLM 8$"):
        other.generate(one % 8, max_length=12, custom_generate=generate)


def test_an_assistant_changes_nothing_but_is_heard(torch_model, assistant, prompts, monkeypatch):
    passes = []
    forward = torch_model.forward
    monkeypatch.setattr(torch_model, "forward", lambda *a, **b: passes.append(0) or forward(*a, **b))
    for prompt in prompts[:, None].unbind():
        del passes[:]
        expected = torch_model.generate(prompt, max_new_tokens=40)
        plainly = len(passes)
        del passes[:]
        assert torch.equal(
            torch_model.generate(prompt, max_new_tokens=40, assistant_model=assistant), expected
        )
        assert len(passes) < 0.8 * plainly


def test_an_assistant_at_the_end_of_its_cache(torch_model, assistant, prompts):
    torch_model.config.max_position_embeddings = 2 * CONTEXT
    expected = torch_model.generate(prompts[:1], max_new_tokens=CONTEXT + 9, eos_token_id=None)
    made = torch_model.generate(
        prompts[:1], max_new_tokens=CONTEXT + 9, eos_token_id=None, assistant_model=assistant
    )
    assert torch.equal(made, expected)


def test_the_target_may_sample_with_an_assistant(torch_model, assistant, prompts):
    """Frequencies of 300 first tokens against the exact ones: every cell within 5 standard errors."""
    one, count = prompts[:1], 300
    with torch.no_grad():
        exact = torch_model(one).logits[0, -1].softmax(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [
            torch_model.generate(one, max_new_tokens=2, do_sample=True, top_k=0, assistant_model=assistant)[
                0, 9
            ]
            for _ in range(count)
        ]
    seen = torch.bincount(torch.stack(drawn), minlength=VOCAB) / count
    error = (exact * (1 - exact) / count).sqrt()
    assert ((seen - exact).abs() <= 5 * error + 1 / count).all()


def test_assistants_that_cannot_be(artifact, assistant):
    with pytest.raises(InputError, match="no entry 'third'"):
        Assistant(artifact, "third")
    artifact.engine.tables.take()
    with pytest.raises(InputError, match="with more `sequences`"):
        Assistant(artifact)


@pytest.mark.slow
@pytest.mark.extended
def test_a_real_model_gives_the_same_text(shared: Path, tmp_path: Path):
    folder = shared / "models" / "pycode-90m"
    specqd.compile(folder, tmp_path / "artifact", context=256)
    artifact = load(tmp_path / "artifact", sequences=2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = torch.tensor([artifact.encode("def fibonacci(n):\n", raw=True)])
    expected = model.generate(prompt, max_new_tokens=100)
    assert torch.equal(
        model.generate(prompt, max_new_tokens=100, custom_generate=specqd_generate(artifact)), expected
    )
    assert torch.equal(
        model.generate(prompt, max_new_tokens=100, assistant_model=Assistant(artifact)), expected
    )
