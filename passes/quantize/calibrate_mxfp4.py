"""calibrate-mxfp4: store the matrices of an entry in MXFP4, rounded so that their outputs change least."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from itertools import chain
from pathlib import Path

import torch
from torch import fx

from specqd.errors import InputError
from specqd.passes.contract import Pass, Progress, Refusal
from specqd.passes.match import weight_of
from specqd.program import Entry, Program

from .calibration_store import Store, fingerprint
from .calibration_text import known_to, read_file
from .cast_mxfp4 import Decision, Head, cast, decide
from .error_compensation import compensate, inverse_factor
from .gram import grams
from .mxfp4 import MXFP4, ScaleRule
from .own_text import write

__all__ = ["CalibrateMXFP4"]

_LEAST_TOKENS = 128


class CalibrateMXFP4(Pass):
    """Cast weights of linears to MXFP4 as cast-mxfp4 does, choosing the roundings with a text.

        linear(x, w, bias)  ->  linear_mxfp4(x, w.mxfp4_blocks, w.mxfp4_scales, bias)

    Graph and weights have the same form as after cast-mxfp4, with the same cases and refusals, and compiled code
    is as fast. Only the values differ: columns make good for the rounding of those before them, weighed by what
    the text puts into the linear (see specqd.passes.quantize.error_compensation).

    1. A linear is calibrated to what the entry puts into it before anything is cast. To what casting makes of that
       instead is usual where a cast model stands alone; it gained less for a draft that shares the target's cache.
    2. A head cast to INT8 is cast directly: its 8 bits lose nothing that a calibration could regain.
    3. Refused besides: a linear whose input is not finite on the text.
    4. Text and finished weights are kept in the cache folder for a month, so that a calibration which was broken off,
       or is asked for again, does not begin anew.

    Attributes:
        text: a UTF-8 file to calibrate on; without one the target writes a text, see specqd.passes.quantize.own_text.
        tokens: how many tokens to calibrate on.
        scale: how the exponent of a block's scale is chosen.
        lm_head: what becomes of the head.
        keep: shell-style patterns of weight names to leave alone, e.g. `*.down_proj.*`.
        damping: added to the diagonal of the Gram matrix of the inputs, as a share of its mean.
        seed: chooses the text, where the model writes it.
    """

    name = "calibrate-mxfp4"
    for_language_models = True
    text: str = ""
    tokens: int = 4096
    scale: ScaleRule = "search"
    lm_head: Head = "int8"
    keep: tuple[str, ...] = ()
    damping: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        if self.tokens < _LEAST_TOKENS:
            raise InputError(
                f"{self.name}: {self.tokens} tokens are too few to calibrate on; give {_LEAST_TOKENS} or more"
            )
        if not 0 < self.damping < float("inf"):
            raise InputError(
                f"{self.name}: a damping of {self.damping} cannot be used; give more than 0, such as 0.1"
            )

    @property
    def lossless(self) -> bool:
        """Rounding to 4 bits changes the logits."""
        return False

    def run(self, program: Program, entry: Entry) -> Iterator[fx.Node | Refusal | Progress]:
        """Calibrate what will be cast, cast it, and say why not for the rest."""
        decided = decide(program, entry, self.lm_head, self.keep)
        wanted = [node for node, form in decided if form == "mxfp4"]
        casts: dict[fx.Node, MXFP4] = {}
        if wanted:
            texts = known_to(entry, (yield from self._texts(program)))
            yield from self._calibrate(program, entry, wanted, texts, casts)
        yield from cast(program, [_if_calibrated(one, casts) for one in decided], casts.__getitem__)

    def _texts(self, program: Program) -> Generator[Progress, None, list[list[int]]]:
        if self.text:
            return read_file(self.text, program.model, self.tokens)
        files = tuple(Path(file).read_bytes() for file in program.model.tokenizer_files)
        store = Store.of("text", fingerprint(program, program.target.name), files, self.tokens, self.seed)
        kept = store.get("text")
        if kept:
            return [text.tolist() for text in kept["tokens"].split(kept["lengths"].tolist())]
        texts = yield from write(program, self.tokens, self.seed)
        lengths = torch.tensor([len(text) for text in texts])
        store.put("text", {"tokens": torch.tensor(list(chain(*texts))), "lengths": lengths})
        return texts

    def _calibrate(
        self,
        program: Program,
        entry: Entry,
        wanted: list[fx.Node],
        texts: list[list[int]],
        casts: dict[fx.Node, MXFP4],
    ) -> Iterator[Progress]:
        """Add the cast weight of each linear to `casts`, unless its input is not finite."""
        store = Store.of("casts", fingerprint(program, entry.name), texts, self.scale, self.damping)
        for node in wanted:
            kept = store.get(node.name)
            if kept:
                casts[node] = MXFP4(kept["blocks"], kept["scales"])
        done, missing = len(casts), [node for node in wanted if node not in casts]
        yield Progress("calibrating", done, len(wanted))
        for linears, gram in grams(program, entry, missing, texts):
            if gram.isfinite().all():
                factor = inverse_factor(gram, self.damping)
                for node in linears:
                    casts[node] = compensate(program.weights[str(weight_of(node))], factor, self.scale)
                    store.put(node.name, casts[node]._asdict())
            done += len(linears)
            yield Progress("calibrating", done, len(wanted))


def _if_calibrated(decision: Decision, casts: dict[fx.Node, MXFP4]) -> Decision:
    node, form = decision
    if form != "mxfp4" or node in casts:
        return decision
    return node, Refusal(node.name, "its input is NaN or infinite on the calibration text")
