"""trim-vocabulary: which tokens a draft keeps, that their logits are as before, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compiled import RUNNABLE, Compiled, random_tokens
from small_programs import DIM, Decoder, of, ops
from torch import Tensor, nn

from specqd.errors import InputError
from specqd.passes import Pipeline
from specqd.passes.speculate.trim_vocabulary import TrimVocabulary
from specqd.program import Program
from specqd.reference import run

VOCAB = 200
CASTS = {
    "plain": "",
    "int8": "draft: cast-mxfp4",
    "mxfp4": "draft: cast-mxfp4{lm_head=mxfp4}",
    "refined": "draft: refine-head{best=1}",
}


class Shifted(Decoder):
    """A decoder whose head has a bias, and is followed by what Gemma 2 does to its logits."""

    def __init__(self) -> None:
        super().__init__(lambda m, x, _: torch.relu(x))
        self.embed, self.lm_head = nn.Embedding(VOCAB, DIM), nn.Linear(DIM, VOCAB)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return torch.tanh(super().forward(tokens, positions) / 30.0) * 30.0


def program(special: tuple[int, ...] = (), files: tuple[str, ...] = ()) -> Program:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        made = of(Shifted().bfloat16().float())
    info = replace(made.model, vocab_size=VOCAB, eos_token_ids=special, tokenizer_files=files)
    return Pipeline.parse("derive-draft")(replace(made, model=info))


def words(folder: Path, special: dict[str, int]) -> tuple[str, ...]:
    """A tokenizer of the words `w0` to `w199`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(folder / "tokenizer.json"))
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    assert {token["content"]: token["id"] for token in added} == special
    return (str(folder / "tokenizer.json"),)


def draft_logits(made: Program, tokens: list[int]) -> Tensor:
    return run(made, made.entries["draft"], torch.tensor([tokens]))[0]


def kept_by(made: Program) -> set[int]:
    """The tokens that a draft can choose."""
    logits = draft_logits(made, [0])[0]
    return set(logits.isfinite().nonzero().flatten().tolist())


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("special", [(), (3,), (199, 150)])
@pytest.mark.parametrize("order", ["before", "after"])
def test_kept_tokens_have_the_logits_they_had(cast: str, special: tuple[int, ...], order: str, rng):
    """Rows are taken as they are: equal but for the order of float additions, 1e-5 of logits below 30."""
    steps = [step for step in (CASTS[cast], "draft: trim-vocabulary{tokens=64}") if step]
    whole = Pipeline.parse(CASTS[cast])(program(special))
    cut = Pipeline.parse(", ".join(steps if order == "after" else steps[::-1]))(program(special))
    kept = sorted({*range(64 - len({s for s in special if s >= 64})), *special})
    tokens = random_tokens(whole, 9, rng)
    expected, got = draft_logits(whole, tokens), draft_logits(cut, tokens)
    if max(kept) == 63:
        assert got.shape == (9, 64)
    else:
        assert got.shape == (9, VOCAB)
        assert kept_by(cut) == set(kept)
        got = got[:, kept]
    if cast == "refined":
        # Other groups of 16 channels may be computed again.
        assert (got - expected[:, kept]).abs().mean() < 0.1
    else:
        torch.testing.assert_close(got, expected[:, kept], rtol=0, atol=1e-5)
    assert torch.equal(
        run(cut, cut.target, torch.tensor([tokens])), run(whole, whole.target, torch.tensor([tokens]))
    )


def test_operators_before_and_after():
    made = program(special=(150,))
    after = Pipeline.parse("draft: trim-vocabulary{tokens=64}")(made)
    assert ops(after, "draft") == [*ops(made, "draft"), "specqd.among_all"]
    assert ops(after) == ops(made)
    head = {name: weight.shape for name, weight in after.weights.items() if "kept" in name}
    assert head == {"lm_head.weight.kept64": (64, DIM), "lm_head.bias.kept64": (64,)}
    assert ops(Pipeline.parse("draft: trim-vocabulary{tokens=64}")(program()), "draft") == ops(made, "draft")


@pytest.mark.parametrize("isa", RUNNABLE)
@pytest.mark.parametrize("special", [(), (199,)])
def test_compiled_code_chooses_among_the_kept_tokens(isa: str, special: tuple[int, ...], rng):
    """Logits are those of the whole head bit for bit, so the choice is that of the kept tokens alone."""
    whole = program(special)
    cut = Pipeline.parse("draft: trim-vocabulary{tokens=60}")(whole)
    kept = [*range(60)] if not special else [*range(59), 199]
    tokens = random_tokens(whole, 3, rng)
    expected = torch.from_numpy(Compiled(whole, isa).feed("draft", tokens, 0))
    got = torch.from_numpy(Compiled(cut, isa).feed("draft", tokens, 0))
    assert torch.equal(got[:, kept], expected[:, kept])
    assert got.shape[1] == (VOCAB if special else 60)
    assert got.isfinite().sum() == 3 * 60


def test_the_most_frequent_tokens_of_a_text(tmp_path: Path):
    files = words(tmp_path, {"w90": 90})
    text = tmp_path / "text.txt"
    text.write_text("w7 w100 w7 w3 w100 w7 w199")
    made = program(special=(5,), files=files)
    for tokens, kept in ((2, {5, 90}), (3, {5, 7, 90}), (4, {5, 7, 90, 100}), (5, {3, 5, 7, 90, 100})):
        assert kept_by(TrimVocabulary(tokens=tokens, text=str(text))(made, "draft").program) == kept
    # What the text does not hold follows in the tokenizer's order.
    assert kept_by(TrimVocabulary(tokens=8, text=str(text))(made, "draft").program) == {
        0, 1, 3, 5, 7, 90, 100, 199,
    }  # fmt: skip


def test_what_is_refused():
    made = program()
    for entry, tokens, why in (
        ("target", 64, "this is the target, which must choose among all its tokens"),
        ("draft", VOCAB, "it has 200 rows, no more than are to be kept"),
    ):
        result = TrimVocabulary(tokens=tokens)(made, entry)
        assert [r.why for r in result.refusals] == [why]
        assert result.rewrites == 0
    refined = Pipeline.parse("draft: refine-head{best=2}")(made)
    (refusal,) = TrimVocabulary(tokens=64)(refined, "draft").refusals
    assert "let refine-head follow" in refusal.why


def test_logits_that_need_each_other_are_refused():
    made = program()
    graph = made.entries["draft"].graph
    output = next(n for n in graph.nodes if n.op == "output")
    with graph.inserting_before(output):
        short = graph.call_function(torch.ops.aten.softmax.int, (output.args[0], -1))
    output.replace_input_with(output.all_input_nodes[0], short)
    (refusal,) = TrimVocabulary(tokens=64)(made, "draft").refusals
    assert refusal.why == "the logits do not come one by one from the head: softmax_int follows it"


@pytest.mark.parametrize("special", [(), (199,)])
def test_a_second_time_changes_nothing(special: tuple[int, ...]):
    once = TrimVocabulary(tokens=64)(program(special), "draft").program
    again = TrimVocabulary(tokens=64)(once, "draft")
    assert again.rewrites == 0
    assert len(again.refusals) == 1


def test_options_that_cannot_be(tmp_path: Path):
    with pytest.raises(InputError, match="cannot keep 0 tokens"):
        TrimVocabulary(tokens=0)
    with pytest.raises(InputError, match="has 2 special tokens, which are always kept; keep more than 1"):
        TrimVocabulary(tokens=1)(program(special=(4, 9)), "draft")
    with pytest.raises(InputError, match=r"the text .*none.txt cannot be used: .* without tokenizer.json"):
        TrimVocabulary(text="none.txt", tokens=9)(program(), "draft")
