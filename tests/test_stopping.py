"""Where an answer ends: stop strings however text and tokens are cut, token ids, cancelling."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import EOS, compile_toy, save_toy, write_tokenizer

from specqd.errors import InputError
from specqd.runtime.model import Model, load
from specqd.runtime.sampling import Sampling
from specqd.runtime.stopping import StopStrings

STOPS = [[], ["a"], ["ab"], ["aab"], ["aba"], ["abab", "bb"], ["abb", "b"], ["bab", "a"], ["x"]]


def first_stop(text: str, stop: list[str]) -> int | None:
    """Where the stop string begins that is complete first, by trying every end."""
    for end in range(1, len(text) + 1):
        begins = [end - len(one) for one in stop if text[:end].endswith(one)]
        if begins:
            return min(begins)
    return None


def may_begin(text: str, stop: list[str]) -> int:
    """Characters at the end of a text without stop string that may still become part of one."""
    return max(
        (
            n
            for n in range(len(text) + 1)
            for one in stop
            if n < len(one) and one.startswith(text[len(text) - n :])
        ),
        default=0,
    )


@pytest.mark.parametrize("stop", STOPS, ids=str)
def test_every_text_of_six_letters_in_every_cut(stop: list[str]):
    for letters in product("ab", repeat=6):
        text = "".join(letters)
        end = first_stop(text, stop)
        for cuts in product((False, True), repeat=5):
            strings, out, begin = StopStrings(stop), "", 0
            for at in range(1, 7):
                if at < 6 and not cuts[at - 1]:
                    continue
                out += strings.add(text[begin:at])
                begin = at
                if not strings.met:
                    # All that can be certain is out, and nothing else.
                    assert out == text[: at - may_begin(text[:at], stop)]
            assert strings.met == (end is not None)
            assert out + strings.finish() == text[:end]
            assert strings.add("a") == "" or not strings.met


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ([""], "cannot stop at ''"),
        (["a", 3], "cannot stop at 3"),
        ("ab", r"stop strings are a list: give \['ab'\]"),
    ],
)
def test_what_is_no_stop_string_is_refused(stop, message: str):
    with pytest.raises(InputError, match=message):
        StopStrings(stop)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("stopping")
    save_toy(folder / "a", compile_toy(folder, wrong_every=4), write_tokenizer(folder))
    return load(folder / "a")


@settings(max_examples=100, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 49), min_size=1, max_size=4),
    begin=st.integers(0, 40),
    size=st.integers(1, 6),
    length=st.integers(1, 5),
)
def test_tokens_and_text_end_alike_whatever_is_drafted(model: Model, prompt, begin, size, length):
    whole = model.generate(prompt, 40, speculate=False, ignore_eos=True)
    stop = [whole.text[begin : begin + size] or "zz", "never met"]
    for speculate in (False, True):
        made = model.generate(
            prompt, 40, speculate=speculate, draft_length=length, ignore_eos=True, stop=stop
        )
        end = first_stop(whole.text, stop)
        assert made.text == whole.text[:end]
        assert "".join(model.stream(prompt, 40, speculate=speculate, ignore_eos=True, stop=stop)) == made.text
        assert made.tokens == whole.tokens[: len(made.tokens)]
        assert made.stats.new_tokens == len(made.tokens)
        if end is None:
            assert (made.stats.finish, len(made.tokens)) == ("length", 40)
        else:
            assert made.stats.finish == "stop"
            # The stop string ends with the last token, and no earlier unless half a character was waited for.
            before = model.text.decode(made.tokens[:-1])
            assert first_stop(model.text.decode(made.tokens), stop) == end
            assert first_stop(before, stop) is None or before.endswith("\ufffd")


def test_end_tokens_of_ones_own(model: Model):
    whole = model.generate([1, 2], 30, ignore_eos=True).tokens
    last = whole[10]
    made = model.generate([1, 2], 30, eos_token_ids={last})
    assert made.tokens == whole[: whole.index(last) + 1]
    assert made.stats.finish == "eos"
    assert model.generate([1, 2], 30, eos_token_ids=()).tokens == whole
    assert EOS not in model.generate([1, 2], 30).tokens[:-1]
    for wrong in (-1, 50, "a"):
        with pytest.raises(InputError, match=f"cannot end after token {wrong!r}: give ids from 0 to 49"):
            model.generate([1], 3, eos_token_ids=[wrong])
    with pytest.raises(InputError, match="not both"):
        model.generate([1], 3, eos_token_ids=[1], ignore_eos=True)


def test_stop_strings_need_a_tokenizer(tmp_path: Path):
    save_toy(tmp_path / "a", compile_toy(tmp_path))
    with pytest.raises(InputError, match="no tokenizer, so its text cannot be stopped at"):
        load(tmp_path / "a").generate([1], 3, stop=["a"])


@pytest.mark.parametrize("allowed", [0, 1, 2, 5])
def test_cancelling_ends_within_a_round(model: Model, allowed: int):
    asked: list[None] = []

    def cancel() -> bool:
        asked.append(None)
        return len(asked) > allowed

    whole = model.generate([1, 2], 50, ignore_eos=True)
    made = model.generate([1, 2], 50, ignore_eos=True, cancel=cancel)
    assert made.stats.finish == "cancelled"
    assert made.stats.rounds == max(0, allowed - 1)
    assert made.tokens == whole.tokens[: len(made.tokens)]
    assert len(made.tokens) < 50
    assert made.text == model.text.decode(made.tokens)
    assert model.generate([1, 2], 50, ignore_eos=True).tokens == whole.tokens


def test_a_finished_answer_is_not_cancelled(model: Model):
    made = model.generate([1, 2], 1, ignore_eos=True, cancel=iter([False, True]).__next__)
    assert made.stats.finish == "length"


def test_closing_a_stream_cancels_and_leaves_the_model_usable(model: Model):
    whole = model.generate([1, 2], 50, ignore_eos=True)
    pieces = model.stream([1, 2], 50, ignore_eos=True)
    begin = next(pieces)
    pieces.close()
    assert model.last.finish == "cancelled"
    assert whole.text.startswith(begin)
    assert 0 < model.last.new_tokens < 50
    assert model.generate([1, 2], 50, ignore_eos=True).tokens == whole.tokens


def test_sampling_needs_logits(model: Model):
    with pytest.raises(InputError, match="compiled to give tokens, not logits"):
        model.generate([1], 3, sampling=Sampling(1.0))
    with pytest.raises(InputError, match="compiled to give tokens, not logits"):
        model.generate([1], 3, logprobs=1)
    assert model.generate([1], 3, sampling=Sampling(0)).tokens == model.generate([1], 3).tokens
    with pytest.raises(TypeError, match="temperature"):
        model.generate([1], 3, temperature=1)
