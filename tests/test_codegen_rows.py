"""A row's bits do not depend on how many rows are in its pass, on the cache's length, or on the threads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from compiled import Compiled, llama, random_tokens, threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from specqd.build import default_pipeline
from specqd.frontends import capture
from specqd.passes import Pipeline
from specqd.program import Entry, ModelInfo, Program

aten = torch.ops.aten
#: past a chunk of 128 positions of attention
LENGTH = 150
CAPACITY = 168
#: layers times key heads of `llama()`
PLANES = 2
PIECE = 32


@dataclass(frozen=True)
class Decoded:
    """An entry, the logits of its tokens fed one at a time, and the caches that it left."""

    entry: str
    compiled: Compiled
    tokens: list[int]
    logits: np.ndarray
    caches: dict[str, np.ndarray]

    def check(self, start: int, passes: list[tuple[int, bool]], nonsense: int) -> None:
        """Feed `(rows, last row only)` after `start` tokens; slots beyond `start` hold `nonsense` before."""
        for name, cache in self.compiled.caches.items():
            cache[...] = self.caches[name]
        for rows, last_only in passes:
            if start + rows > len(self.tokens):
                return
            piece = self.tokens[start : start + rows]
            if nonsense:  # as a draft that was not accepted
                wrong = [(token + nonsense) % self.compiled.program.model.vocab_size for token in piece]
                self.compiled.feed(self.entry, wrong, start, last_only)
            got = self.compiled.feed(self.entry, piece, start, last_only)
            wanted = self.logits[start : start + rows][-len(got) :]
            assert np.array_equal(got, wanted), (
                f"{rows} rows at {start} differ by {np.abs(got - wanted).max()}"
            )
            start += rows


def decoded(compiled: Compiled, entry: str) -> Decoded:
    tokens = random_tokens(compiled.program, LENGTH, torch.Generator().manual_seed(9))
    logits = compiled.decode(entry, tokens, 1)
    return Decoded(entry, compiled, tokens, logits, {n: c.copy() for n, c in compiled.caches.items()})


@pytest.fixture(scope="module")
def tiny() -> dict[str, Decoded]:
    made = Compiled(llama())
    return {entry: decoded(made, entry) for entry in ("target", "draft")}


def passes(rows: list[int]) -> st.SearchStrategy[list[tuple[int, bool]]]:
    return st.lists(st.sampled_from([(r, False) for r in rows]), min_size=1, max_size=12)


STARTS = st.one_of(st.integers(0, LENGTH - 1), st.sampled_from([14, 15, 16, 120, 126, 127, 128, 129]))
NONSENSE = st.sampled_from([0, 0, 1, 17])


@settings(max_examples=15, deadline=None)
@given(st.data(), STARTS, NONSENSE, st.sampled_from([1, 2]))
def test_target(tiny: dict[str, Decoded], data: st.DataObject, start: int, nonsense: int, count: int) -> None:
    sizes = [(rows, False) for rows in (*range(1, 9), 16)] + [(PIECE, True)]
    with threads(count):
        tiny["target"].check(
            start, data.draw(st.lists(st.sampled_from(sizes), min_size=1, max_size=12)), nonsense
        )


@settings(max_examples=20, deadline=None)
@given(passes([1, 2, 4]), STARTS, NONSENSE, st.sampled_from([1, 2]))
def test_draft(
    tiny: dict[str, Decoded], sizes: list[tuple[int, bool]], start: int, nonsense: int, count: int
) -> None:
    with threads(count):
        tiny["draft"].check(start, sizes, nonsense)


def test_every_size_at_every_offset_of_a_block(tiny: dict[str, Decoded]) -> None:
    """What chance may leave out: each size across the edges of blocks of 16 and of a chunk of 128."""
    for start in (*range(17), *range(112, 130)):
        for rows in (*range(1, 9), 16):
            tiny["target"].check(start, [(rows, False)], 0)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(["target", "draft"]),
    st.lists(st.tuples(st.integers(0, LENGTH - 1), st.integers(1, 6)), min_size=3, max_size=3),
    st.data(),
)
def test_rows_of_several_sequences(
    tiny: dict[str, Decoded], entry: str, pieces: list[tuple[int, int]], data: st.DataObject
) -> None:
    """Three sequences of the same tokens, each at another place, in one pass and in any order of its rows."""
    made = tiny[entry]
    in_order = [
        (made.tokens[p], p, sequence)
        for sequence, (start, count) in enumerate(pieces)
        for p in range(start, min(start + count, LENGTH))
    ]
    in_order = in_order[: max(size for size in (3, 4, 8, 16) if size <= len(in_order))]  # few to compile
    rows = data.draw(st.one_of(st.just(in_order), st.permutations(in_order)))
    for name, cache in made.compiled.caches.items():
        cache[...] = made.caches[name]
    for sequence in (1, 2):
        copy_sequence(made.compiled, sequence)
    got = made.compiled.feed_rows(entry, rows)
    assert np.array_equal(got, made.logits[[position for _, position, _ in rows]])


def copy_sequence(compiled: Compiled, sequence: int) -> None:
    """Let a sequence's blocks hold what those of sequence 0 hold."""
    tables = compiled.tables
    for cache in compiled.caches.values():
        blocks = cache.reshape(PLANES, compiled.pool, -1)
        blocks[:, tables[sequence]] = blocks[:, tables[0]]


def test_two_threads_are_two(tiny: dict[str, Decoded]) -> None:
    with threads(2) as count:
        if count < 2:
            pytest.skip("the thread pool of this process was started with one thread")
    tiny["target"].check(0, [(1, False)] * 20, 0)


@pytest.fixture(scope="module")
def code(shared: Path) -> Compiled:
    return Compiled(Pipeline.parse(default_pipeline(CAPACITY))(capture(shared / "models" / "pycode-8m")))


@pytest.fixture(scope="module")
def trained_target(code: Compiled) -> Decoded:
    return decoded(code, "target")


@pytest.fixture(scope="module")
def trained_draft(code: Compiled) -> Decoded:
    return decoded(code, "draft")


@settings(max_examples=10, deadline=None)
@given(passes([1, 4]), STARTS, NONSENSE)
def test_a_trained_target(
    trained_target: Decoded, sizes: list[tuple[int, bool]], start: int, nonsense: int
) -> None:
    with threads(2):
        trained_target.check(start, sizes, nonsense)


@pytest.mark.slow
@pytest.mark.extended
@settings(max_examples=10, deadline=None)
@given(passes([1, 2]), STARTS, NONSENSE)
def test_a_trained_draft(
    trained_draft: Decoded, sizes: list[tuple[int, bool]], start: int, nonsense: int
) -> None:
    with threads(2):
        trained_draft.check(start, sizes, nonsense)


def norms() -> Program:
    """Both norms of widths around the vectors, with everything around them that could be fused into them."""
    rng = torch.Generator().manual_seed(11)
    graph, weights, parts = fx.Graph(), {}, []
    tokens, _ = graph.placeholder("tokens"), graph.placeholder("positions")

    def stored(name: str, *shape: int) -> fx.Node:
        weights[name] = torch.randn(*shape, generator=rng)
        return graph.create_node("get_attr", name, name=f"w_{name}")

    for width in (1, 5, 8, 31, 64):
        x = graph.call_function(aten.embedding.default, (stored(f"x{width}", 40, width), tokens))
        gain, shift = stored(f"g{width}", width), stored(f"b{width}", width)
        layer = graph.call_function(aten.layer_norm.default, (x, [width], gain, shift, 1e-5))
        parts.append(graph.call_function(aten.add.Tensor, (layer, x)))
        mean = graph.call_function(aten.mean.dim, (x, [-1], True))
        parts.append(graph.call_function(aten.sub.Tensor, (x, mean)))
        parts.append(graph.call_function(torch.ops.specqd.rms_norm.default, (x, gain, 1e-5, 1.0)))
    graph.output(graph.call_function(aten.cat.default, (parts, -1)))
    return Program({"target": Entry("target", graph)}, weights, ModelInfo("norms", 40, 64))


def test_norms_of_any_width() -> None:
    from specqd.reference import run

    made = Compiled(norms())
    tokens = list(range(40))
    one_by_one = made.decode("target", tokens, 1)
    wanted = run(made.program, made.program.target, torch.tensor([tokens]))[0].numpy()
    np.testing.assert_allclose(one_by_one, wanted, rtol=1e-5, atol=2e-5)
    for rows in (2, 8):
        assert np.array_equal(made.decode("target", tokens, rows), one_by_one), f"{rows} rows"
