"""Plain and speculative decoding of a toy model, compared with what the model says by definition."""

import itertools
import os
import subprocess
import sys
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import CAPACITY, EOS, VOCAB, compile_toy, model_next, save_toy, table

from specqd.errors import ArtifactError, InputError
from specqd.runtime.asking import run
from specqd.runtime.choosing import Greedy
from specqd.runtime.drafting import FixedLength
from specqd.runtime.generate import Decoding, Stats
from specqd.runtime.levels import Source, Verifier
from specqd.runtime.library import aligned, tensor
from specqd.runtime.model import Model, load
from specqd.runtime.output import Output

TABLE = table().tolist()


def continuation(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(model_next(tokens, TABLE))
    return tokens[len(prompt) :]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    return compile_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module", params=["draft", "other"])
def model(request, compiled, tmp_path_factory) -> Model:
    target = tmp_path_factory.mktemp("artifact") / request.param
    save_toy(target, compiled, chain=("target", request.param))
    return load(target)


PROMPTS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40)


@settings(max_examples=150, deadline=None)
@given(
    prompt=PROMPTS, limit=st.integers(1, 70), length=st.none() | st.integers(1, 9), ignore_eos=st.booleans()
)
def test_plain_and_speculative_tokens_are_the_models(model, prompt, limit, length, ignore_eos):
    expected = continuation(prompt, min(limit, CAPACITY - len(prompt) + 1))
    finish = "length" if len(expected) == limit else "context"
    if EOS in expected and not ignore_eos:
        expected = expected[: expected.index(EOS) + 1]
        finish = "eos"
    for speculate in (False, True):
        made = model.generate(prompt, limit, speculate=speculate, draft_length=length, ignore_eos=ignore_eos)
        assert made.tokens == expected
        assert made.stats.finish == finish
        assert made.stats.new_tokens == len(expected)
        assert made.text == ""


def test_figures_add_up(model: Model):
    stats = model.generate([1, 2, 3], 40, draft_length=3, ignore_eos=True).stats
    assert 0 < stats.accepted <= stats.examined <= stats.drafted
    assert stats.new_tokens == 1 + stats.rounds + stats.accepted
    assert stats.tokens_per_verify == pytest.approx(39 / stats.rounds)
    assert stats.acceptance_rate == pytest.approx(stats.accepted / stats.examined)
    plain = model.generate([1, 2, 3], 40, ignore_eos=True, speculate=False).stats
    assert (plain.rounds, plain.drafted, plain.acceptance_rate) == (39, 0, None)
    assert plain.decode_tokens_per_s > 0
    assert plain.prefill_tokens_per_s > 0


class Scripted:
    """An engine whose draft is right or wrong as scripted, and that checks every call it gets."""

    def __init__(self, truth: list[int], script: list[bool], prompt: int) -> None:
        self.truth, self.script, self.prompt = truth, list(script), prompt
        self.capacity = len(truth)
        self.vocab_size = VOCAB
        self.cache: list[int] = []
        self.seconds = 0.0
        self.prefix_sharing = False

    def rows(self, entry: str, *, every_row: bool = False) -> tuple[int, ...]:
        return (1, 2, 3, 4)

    def room(self, entry: str, start: int) -> int:
        return min(4, self.capacity - start)

    def feed(self, entry: str, tokens: list[int], start: int, sequence: int = 0) -> Output:
        self.cache[start:] = tokens
        if entry == "target":
            chosen = [self.truth[start + i + 1] for i in range(len(tokens))]
        else:
            true = self.truth[start + 1]
            chosen = [true if self.script.pop(0) else (true + 1) % VOCAB]
        return Output(np.array(chosen), None, None, VOCAB)

    def target(self, length: int, stop: Collection[int] = ()) -> Verifier:
        """A target with a draft on its cache."""
        draft = Verifier(self, "draft", Greedy(), shares=True, stop=stop)
        return Verifier(self, "target", Greedy(), [Source(draft, FixedLength(length))], stop=stop)


def decode(engine: Scripted, target: Verifier, prompt: list[int], stats: Stats) -> Iterator[list[int]]:
    """The tokens of each round."""
    decoding = Decoding(engine, target, prompt, stats, 100)
    while not stats.finish:
        yield run(engine, decoding.advance())


@pytest.mark.parametrize("script", list(itertools.product([True, False], repeat=6)))
def test_every_pattern_of_acceptance_in_two_rounds_of_three(script: tuple[bool, ...]):
    truth = list(range(10, 30))
    engine = Scripted(truth, list(script), 2)
    stats = Stats()
    rounds = decode(engine, engine.target(3), truth[:2], stats)
    first, second, third = (next(rounds) for _ in range(3))
    agreed = [next((i for i, right in enumerate(part) if not right), 3) for part in (script[:3], script[3:])]
    assert first == truth[2:3]
    assert [len(second), len(third)] == [agreed[0] + 1, agreed[1] + 1]
    assert first + second + third == truth[2 : 2 + 3 + sum(agreed)]
    assert stats.accepted == sum(agreed)
    assert stats.examined == sum(min(count + 1, 3) for count in agreed)


@pytest.mark.parametrize("place", range(5))
def test_a_stop_token_inside_a_draft_ends_the_text_there(place: int):
    truth = list(range(10, 30))
    engine = Scripted(truth, [True] * 6, 2)
    stop = truth[2 + place]
    rounds = decode(engine, engine.target(3, {stop}), truth[:2], Stats())
    assert list(itertools.chain(*rounds)) == truth[2 : 3 + place]


def test_a_full_prompt_gives_one_token_and_a_longer_one_is_refused(model: Model):
    full = [i % VOCAB for i in range(CAPACITY)]
    made = model.generate(full, 10, ignore_eos=True)
    assert made.tokens == continuation(full, 1)
    assert made.stats.finish == "context"
    with pytest.raises(InputError, match=r"prompt has 65 tokens and the cache holds 64.*--context 75"):
        model.generate([*full, 1], 10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.generate([]), "empty"),
        (lambda m: m.generate([1], 0), "cannot generate 0"),
        (lambda m: m.generate([1], draft_length=0), "cannot draft 0"),
        (lambda m: m.generate([VOCAB]), "token 50 is not in the model's vocabulary of 50"),
        (lambda m: m.generate([1, {"role": "user"}]), "mixture"),
        (lambda m: m.engine.step("target", [1], CAPACITY), "do not fit the cache of 64"),
        (lambda m: m.engine.step("target", [1], -1), "do not fit"),
        (lambda m: m.engine.step("target", [1] * 17, 0), "takes 1, 2, 3, 4, 8, 16 rows at a time, not 17"),
        (lambda m: m.engine.step("third", [1], 0), "no entry 'third'; it has target, draft, other"),
        (lambda m: m.engine.logits("target", 1), "tokens, not logits"),
        (lambda m: m.engine.logits("target", 5), "not 5"),
        (lambda m: load(m.engine.artifact.directory, threads=0), "0 threads"),
    ],
)
def test_what_cannot_be_done_is_said(model: Model, call, message: str):
    with pytest.raises(InputError, match=message):
        call(model)


def test_text_needs_a_tokenizer(model: Model):
    with pytest.raises(ArtifactError, match=r"no tokenizer\.json"):
        model.generate("hello")


def test_bytes_of_a_step_count_weights_once_and_the_cache_so_far(model: Model):
    assert model.engine.step_bytes("target", 1, CAPACITY) == 4 * VOCAB + 2 * CAPACITY
    assert model.engine.step_bytes("target", 4, CAPACITY // 2) == 4 * VOCAB + CAPACITY


def test_memory_that_compiled_code_could_not_load_vectors_from_is_refused():
    assert tensor(aligned(64).view(np.int32)).shape == (16,)
    with pytest.raises(RuntimeError, match="not aligned to 64 bytes"):
        tensor(aligned(68)[4:].view(np.int32))


def test_a_fresh_process_loads_neither_torch_nor_tvm_nor_transformers(compiled, tmp_path: Path):
    save_toy(tmp_path / "a", compiled)
    code = (
        "import sys; from specqd.runtime.model import load\n"
        f"print(load({str(tmp_path / 'a')!r}).generate([1, 2, 3], 5, ignore_eos=True).tokens)\n"
        "print(sorted({'torch', 'tvm', 'transformers', 'rich', 'jinja2'} & sys.modules.keys()))"
    )
    env = {**os.environ, "SPECQD_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.splitlines() == [str(continuation([1, 2, 3], 5)), "[]"]


def test_a_library_that_lacks_a_function_or_is_none(compiled, tmp_path: Path):
    changed = compiled.functions[0].model_copy(update={"symbol": "missing"})
    save_toy(tmp_path / "a", replace(compiled, functions=(changed,)))
    with pytest.raises(ArtifactError, match="no function 'missing'"):
        load(tmp_path / "a")
    save_toy(tmp_path / "b", replace(compiled, library=b"not a library"))
    with pytest.raises(ArtifactError, match="cannot load"):
        load(tmp_path / "b")


def test_weights_that_do_not_fit_the_code(compiled, tmp_path: Path):
    save_toy(tmp_path / "a", replace(compiled, weights={"table": np.zeros(3, np.int32)}))
    with pytest.raises(ArtifactError, match="does not hold 'table' as compiled"):
        load(tmp_path / "a")
