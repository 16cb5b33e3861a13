"""Text that a small random model writes itself: rows against the model run on each text alone."""

import dataclasses

import pytest
import torch
from family_configs import FAMILIES, POSITIONS, VOCAB, random_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close

from specqd.errors import InputError
from specqd.frontends.huggingface import capture
from specqd.passes import Pipeline, Progress
from specqd.passes.quantize.own_text import QUESTIONS, _Rows, write
from specqd.prompts import PROMPTS
from specqd.reference import run

TEMPLATE = "{% for m in messages %}w3 {{ m['content'] }} w4{% endfor %}"


def captured(family, **model):
    program = Pipeline.parse("fuse-rope, insert-kv-cache")(capture(random_model(FAMILIES[family]())))
    program.model = dataclasses.replace(program.model, **model)
    return program


@pytest.fixture(scope="module")
def program():
    return captured("llama")


def texts_of(program, tokens=150, seed=0):
    writing, told = write(program, tokens, seed), []
    while True:
        try:
            told.append(next(writing))
        except StopIteration as end:
            return end.value, told


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
def test_a_row_says_what_the_model_says_of_its_text_alone(family, rng):
    program = captured(family)
    lengths, model = [9, 4, 7], _Rows(program, 3, 16)
    texts = [torch.randint(VOCAB, (length,), generator=rng).tolist() for length in lengths]
    got = [[], [], []]
    for step in range(9):  # the shorter ones begin anew in the same row
        places = [step % length for length in lengths]
        logits = model.step([text[place] for text, place in zip(texts, places, strict=True)], places)
        for row, logit in enumerate(logits):
            got[row].append(logit)
    exact = program.copy()
    exact.caches = {
        name: dataclasses.replace(cache, key_dtype="float32", value_dtype="float32")
        for name, cache in program.caches.items()
    }
    for text, length, rows in zip(texts, lengths, got, strict=True):
        expected = run(exact, exact.target, torch.tensor([text]))[0]
        # Float32 sums in another order, of logits with a deviation near 1.
        assert_close(torch.stack(rows), expected[[i % length for i in range(9)]], rtol=1e-5, atol=3e-5)


def test_the_seed_decides_the_text_and_the_count_is_met(program):
    texts, told = texts_of(program)
    assert (texts, told) == texts_of(program)
    assert texts != texts_of(program, seed=1)[0]
    assert 150 <= sum(map(len, texts)) <= 150 + 2 * len(QUESTIONS) + len(texts)
    assert (
        told[0] == Progress("writing a text to calibrate on", 0, 150) and told[-1].done < told[-1].of == 150
    )


def test_a_text_ends_with_eos_or_where_it_is_full(program):
    texts, _ = texts_of(program, tokens=1200)
    ended = texts[: -len(QUESTIONS)]
    assert ended and all(len(text) == POSITIONS or text[-1] == 2 for text in ended)
    assert any(len(text) == POSITIONS for text in ended) and any(text[-1] == 2 for text in ended)
    assert all(2 not in text[1:-1] for text in texts)


@pytest.mark.parametrize(
    ("known", "first"),
    [({}, {2}), ({"eos_token_ids": ()}, {1}), ({"eos_token_ids": (), "bos_token_id": None}, None)],
)
def test_a_text_without_a_question_begins_as_a_new_one(known, first):
    texts, _ = texts_of(captured("llama", **known), tokens=128)
    begins = {text[0] for text in texts}
    assert begins == first if first else len(begins) > 6


def test_a_model_that_can_chat_answers_the_questions(tmp_path):
    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    files = tuple(str(tmp_path / name) for name in ("tokenizer.json", "chat_template.jinja"))
    texts, _ = texts_of(captured("llama", tokenizer_files=files), tokens=300)
    asked = [[3, *[0] * len(question.split()), 4] for question in QUESTIONS]
    begun = {tuple(one) for one in asked for text in texts if text[: len(one)] == one}
    assert begun == set(map(tuple, asked))
    assert all(any(text[: len(one)] == one[: len(text)] for one in asked) for text in texts)


def test_the_questions_are_no_prompts_of_the_benchmark():
    assert not set(QUESTIONS) & set(PROMPTS)
    assert len(set(QUESTIONS)) == 12


def test_a_target_without_a_cache_is_refused():
    with pytest.raises(
        InputError, match=r"needs a cache to write a text; put insert-kv-cache first, or give text="
    ):
        texts_of(capture(random_model(FAMILIES["llama"]())))


def test_logits_that_are_no_numbers_are_refused(program):
    broken = program.copy()
    broken.weights["model.norm.weight"] = torch.full((48,), torch.nan)
    with pytest.raises(InputError, match=r"logits hold NaN or infinity.*give text=FILE"):
        texts_of(broken)
