"""The tables of `decode.py`: decoding, ratios, verify passes, speculation with its model, prefill."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from compiled import Compiled
from report import Spread, Table, spread

__all__ = ["DecodeTables"]

Rounds = Sequence[Mapping[str, Sequence[Mapping[str, float]]]]

_PLAIN, _PLAN, _PASSES, _MEMORY = "specqd plain", "specqd plan", "specqd passes", "stream read"


class DecodeTables:
    """Summaries of rounds; bytes are of a step at position `middle`."""

    def __init__(
        self,
        rounds: Rounds,
        compiled: Compiled,
        peers: Mapping[str, Mapping[str, Any]],
        drafts: Sequence[int],
        middle: int,
    ) -> None:
        self._rounds = rounds
        self._drafts = drafts if compiled.draft else ()
        self._rows = compiled.verify_rows
        self._bytes = {_PLAIN: compiled.bytes(compiled.target, middle)}
        if compiled.draft:
            self._bytes["specqd draft step"] = compiled.bytes(compiled.draft, middle)
        for name, facts in peers.items():
            for model, size in facts["weight_bytes"].items():
                self._bytes[f"{name} {model}"] = size + middle * facts["cache_bytes"][model]

    def all(self) -> list[Table]:
        """Return every table that the rounds have data for."""
        tables = [self._decoding(), self._ratios(), self._verifying(), self._prefill()]
        return [*tables, self._speculation()] if self._drafts else tables

    def _each(self, name: str, key: str = "tokens/s") -> list[float]:
        """One value a round: the median where a round measured more than once."""
        return [median(sample[key] for sample in done[name]) for done in self._rounds]

    def _rates(self, name: str) -> list[float]:
        """Tokens a second, one a round; the draft's is that of its single steps."""
        if name == "specqd draft step":
            return [1 / seconds for seconds in self._each(_PASSES, "draft")]
        return self._each(name)

    def _decoding(self) -> Table:
        memory = self._each(_MEMORY, "GB/s")
        rows = [["stream read", "", "", spread(memory).show(1), ""]]
        figures: dict[str, Any] = {"stream read GB/s": spread(memory)}
        for name, size in self._bytes.items():
            rates = self._rates(name)
            moved = [rate * size / 1e9 for rate in rates]
            share = spread(100 * a / b for a, b in zip(moved, memory, strict=True))
            mb = f"{size / 1e6:.1f}"
            rows.append([name, spread(rates).show(1), mb, f"{median(moved):.1f}", share.show(0, " %")])
            figures[name] = {
                "tokens/s": spread(rates), "bytes a token": size, "GB/s": spread(moved), "% of stream read": share,
            }  # fmt: skip
        for length in self._drafts:
            rates = self._each(f"specqd draft {length}")
            rows.append([f"specqd speculative, {length} drafted", spread(rates).show(1), "", "", ""])
            figures[f"specqd speculative {length}"] = {"tokens/s": spread(rates)}
        if self._drafts:
            rates = self._each(_PLAN)
            rows.append(["specqd speculative, by its plan", spread(rates).show(1), "", "", ""])
            figures[_PLAN] = {"tokens/s": spread(rates)}
        headings = ["decoding", "tokens/s", "MB a token", "GB/s", "of stream read"]
        return Table(
            "Weights and cache that a step must read, against what a plain read achieves:",
            headings,
            rows,
            figures,
        )

    def _ratios(self) -> Table:
        found = {f"{a} / {b}": self._ratio(a, b) for a, b in self._pairs()}
        rows = [[name, ratio.show()] for name, ratio in found.items()]
        return Table(
            "Ratios of the same round (tokens/s):", ["ratio", "median (range)"], rows, {"ratios": found}
        )

    def _pairs(self) -> Iterator[tuple[str, str]]:
        names = self._rounds[0]
        wanted = [(_PLAIN, "llama.cpp bf16"), (_PLAIN, "transformers bfloat16")]
        if self._drafts:
            best = max(self._drafts, key=lambda length: median(self._speedups(length)))
            named = [_PLAN, f"specqd draft {best}"]
            wanted += [(name, other) for name in named for other in (_PLAIN, "llama.cpp bf16")]
            wanted += [("specqd draft step", f"llama.cpp {kind}") for kind in ("mxfp4", "q4_0")]
        wanted += [
            ("specqd prefill", f"{peer} prefill") for peer in ("llama.cpp bf16", "transformers bfloat16")
        ]
        return (pair for pair in wanted if pair[1] in names)

    def _ratio(self, a: str, b: str) -> Spread:
        return spread(x / y for x, y in zip(self._rates(a), self._rates(b), strict=True))

    def _speedups(self, length: int) -> list[float]:
        return [a / b for a, b in zip(self._each(f"specqd draft {length}"), self._each(_PLAIN), strict=True)]

    def _costs(self, name: str) -> list[float]:
        """Time of a pass over that of one row, one a round."""
        return [a / b for a, b in zip(self._each(_PASSES, name), self._each(_PASSES, "1"), strict=True)]

    def _verifying(self) -> Table:
        costs = {str(rows): spread(self._costs(str(rows))) for rows in self._rows}
        first = ["one pass of the target: rows", *costs]
        ms = ["ms", *(f"{1e3 * median(self._each(_PASSES, rows)):.1f}" for rows in costs)]
        relative = ["of one row", *(cost.show() for cost in costs.values())]
        return Table("Verify passes:", first, [ms, relative], {"verify cost": costs})

    def _prefill(self) -> Table:
        names = [name for name in self._rounds[0] if name.endswith(" prefill")]
        found = {name: spread(self._each(name)) for name in sorted(names, key=lambda name: name[0] != "s")}
        rows = [[name.removesuffix(" prefill"), rate.show(0)] for name, rate in found.items()]
        return Table("Prefill of 512 tokens:", ["prefill", "tokens/s"], rows, {"prefill": found})

    def _speculation(self) -> Table:
        draft = median(self._costs("draft"))
        rows, figures = [], {}
        for length in self._drafts:
            total = self._totals(f"specqd draft {length}")
            rate, per_pass = total["accepted"] / total["examined"], total["new"] / total["verified"]
            verify = median(self._costs(str(length + 1)))
            predicted, measured = spread(self._predicted(length)), spread(self._speedups(length))
            rows.append([
                str(length), measured.show(), predicted.show(), f"{rate:.2f}", f"{per_pass:.2f}", f"{verify:.2f}"
            ])  # fmt: skip
            figures[str(length)] = {
                "speedup": measured, "predicted": predicted, "acceptance": rate, "tokens a verify pass": per_pass,
                "v": verify, "c": draft,
            }  # fmt: skip
        headings = ["drafted (g)", "speed-up", "predicted", "acceptance (a)", "tokens a pass", "v"]
        title = (
            f"Speculative over plain decoding on these {len(self._rounds)} prompts, measured and as "
            "S = E / (g c + v) predicts it from each round's own a, c and v, with E = 1 + a + ... + a^g, v the verify "
            f"pass of g + 1 rows and c = {draft:.2f} a draft step, both over a plain step:"
        )
        return Table(title, headings, rows, {"speculation": figures})

    def _predicted(self, length: int) -> Iterator[float]:
        costs = zip(self._costs("draft"), self._costs(str(length + 1)), strict=True)
        for done, (draft, verify) in zip(self._rounds, costs, strict=True):
            (sample,) = done[f"specqd draft {length}"]
            rate = sample["accepted"] / sample["examined"]
            yield sum(rate**i for i in range(length + 1)) / (length * draft + verify)

    def _totals(self, name: str) -> dict[str, float]:
        samples = [sample for done in self._rounds for sample in done[name]]
        return {
            key: sum(sample[key] for sample in samples) for key in ("accepted", "examined", "new", "verified")
        }
