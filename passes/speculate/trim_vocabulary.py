"""trim-vocabulary: a draft's head gives the logits of some tokens only."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import fx

from specqd.errors import InputError
from specqd.ops import REFINED_TOGETHER
from specqd.passes.contract import Pass, Refusal
from specqd.passes.match import calls, head
from specqd.passes.quantize.calibration_text import encode_file
from specqd.passes.quantize.refine_head import WORTH
from specqd.passes.rewrite import add_weight, read_weight, replace
from specqd.program import Entry, ModelInfo, Program

__all__ = ["TrimVocabulary"]

aten, ops = torch.ops.aten, torch.ops.specqd

#: what may follow the head: each logit by itself
_ONE_BY_ONE = (aten.mul, aten.div, aten.add, aten.tanh, aten.clone, aten.contiguous, aten._to_copy)


class TrimVocabulary(Pass):
    """Keep some rows of a draft's head: the other tokens are never drafted, and the draft reads less.

        linear(x, w [V, k])  ->  linear(x, w.first<n> [n, k])
        linear(x, w [V, k])  ->  among_all(linear(x, w.kept<n> [n, k]), places [V])

    The target still chooses among all its tokens; where it chooses one that the draft lacks, a draft is rejected. The
    draft reads every token (after FR-Spec, arXiv 2502.14856).

    1. Tokens are kept in the tokenizer's order, which for byte-pair encodings is that of their frequency in the
       tokenizer's training, or by their frequency in `text`; those that are equally frequent there in the former
       order.
    2. Tokens that end a text, begin it, or are special in the tokenizer are kept whatever the order says.
    3. If the first `tokens` ids are kept, the logits are theirs, and a shorter row; else they are put among those of
       all tokens, -inf for the others.
    4. A head that is cast already is trimmed as it is, for rounding is a matter of each row.
    5. Refused: the target, a head that is not larger, logits that do not come one by one from one linear with a
       stored weight, and a refined head of which the most would be computed again.

    Attributes:
        tokens: how many are kept.
        text: a UTF-8 file in which to count tokens; without one they are kept in the tokenizer's order.
    """

    name = "trim-vocabulary"
    for_language_models = True
    tokens: int = 16384
    text: str = ""

    def __post_init__(self) -> None:
        """Check the number."""
        super().__post_init__()
        if self.tokens < 1:
            raise InputError(f"{self.name}: cannot keep {self.tokens} tokens; give 1 or more")

    @property
    def lossless(self) -> bool:
        """Logits are left out."""
        return False

    def run(self, program: Program, entry: Entry) -> Iterator[fx.Node | Refusal]:
        """Take the rows out of everything the head stores a row a token of, or say why not."""
        output = next(n for n in reversed(entry.graph.nodes) if n.op == "output")
        node = head(entry.graph)
        reason = self._unsuitable(program, entry, node)
        if reason or node is None:
            yield Refusal((node or output).name, reason or "the logits do not come from one linear")
            return
        channels = _channels(program, node)
        kept = self._kept(program.model, channels)
        first = kept == list(range(len(kept)))
        rows, form = torch.tensor(kept), f"{'first' if first else 'kept'}{len(kept)}"
        arguments = tuple(
            read_weight(node, add_weight(program, f"{a.target}.{form}", program.weights[str(a.target)][rows]))
            if isinstance(a, fx.Node) and a.op == "get_attr"
            else a
            for a in node.args
        )
        yield replace(node, node.target, arguments)
        if first:
            return
        places = torch.full((channels,), -1, dtype=torch.int32)
        places[rows] = torch.arange(len(kept), dtype=torch.int32)
        yield _put_among_all(program, output, add_weight(program, f"{entry.name}.places", places))

    def _kept(self, model: ModelInfo, channels: int) -> list[int]:
        """Ids of the tokens to keep, ascending."""
        special = {token for token in _special(model) if token < channels}
        if len(special) > self.tokens:
            raise InputError(
                f"{self.name}: the tokenizer has {len(special)} special tokens, which are always kept; keep more than "
                f"{self.tokens}"
            )
        seen = Counter(encode_file(self.text, model)) if self.text else Counter[int]()
        order = sorted(range(channels), key=lambda token: (token not in special, -seen[token], token))
        return sorted(order[: self.tokens])

    def _unsuitable(self, program: Program, entry: Entry, node: fx.Node | None) -> str | None:
        if entry.name == program.chain[0]:
            return "this is the target, which must choose among all its tokens"
        if node is None:
            return None
        stored = [a for a in node.args[1:] if isinstance(a, fx.Node)]
        if any(a.op != "get_attr" for a in stored):
            return "its weight is computed, not stored"
        channels = _channels(program, node)
        if channels <= self.tokens:
            return f"it has {channels} rows, no more than are to be kept"
        other = _not_one_by_one(entry, node)
        if other:
            return f"the logits do not come one by one from the head: {other} follows it"
        if calls(node, ops.linear_refined) and self.tokens < WORTH * REFINED_TOGETHER * int(node.args[-1]):
            return f"its {self.tokens} rows would nearly all be computed again; let refine-head follow, not come before"
        return None


def _channels(program: Program, node: fx.Node) -> int:
    return len(program.weights[str(node.args[1].target)])


def _not_one_by_one(entry: Entry, node: fx.Node) -> fx.Node | None:
    """Return what makes logits after the head, other than each from its own."""
    after = list(entry.graph.nodes)[list(entry.graph.nodes).index(node) + 1 :]
    for other in after:
        numbers = not any(a is not node and a.op == "get_attr" for a in other.all_input_nodes)
        if other.op == "call_function" and not (calls(other, *_ONE_BY_ONE) and numbers):
            return other
    return None


def _special(model: ModelInfo) -> set[int]:
    """Ids of tokens that no order may leave out."""
    ids = {*model.eos_token_ids}
    if model.bos_token_id is not None:
        ids.add(model.bos_token_id)
    file = next((Path(f) for f in model.tokenizer_files if Path(f).name == "tokenizer.json"), None)
    if file is not None:
        added = json.loads(file.read_text("utf-8")).get("added_tokens") or []
        ids |= {token["id"] for token in added if token.get("special")}
    return ids


def _put_among_all(program: Program, output: fx.Node, places: str) -> fx.Node:
    """Put the logits that `output` returns among those of all tokens."""
    short = output.all_input_nodes[0]
    table = read_weight(output, places)
    with output.graph.inserting_before(output):
        whole = output.graph.call_function(ops.among_all.default, (short, table))
    output.replace_input_with(short, whole)
    return whole
