"""Compiled attention that says how much weight each slot received."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compiled import (
    EXTENDED,
    NATIVE,
    RUNNABLE,
    Compiled,
    llama,
    random_tokens,
    with_bf16_activations,
)

from specqd.codegen.isa import TABLE
from specqd.manifest import OBSERVER
from specqd.passes.kv.select import SelectKV
from specqd.reference import Interpreter, inputs, new_caches


@pytest.mark.parametrize(
    ("isa", "start", "rows"),
    [
        (name, *case)
        if name == NATIVE.name and case not in {(0, 16), (37, 5)}
        else pytest.param(name, *case, marks=EXTENDED)
        for name in RUNNABLE
        for case in ((0, 16), (150, 16), (37, 5), (20, 1))
    ],
)
def test_slots_receive_what_the_reference_says(isa: str, start: int, rows: int) -> None:
    program = SelectKV(tokens=100)(llama()).program
    made = Compiled(program, isa)
    tokens = random_tokens(program, start + rows, torch.Generator().manual_seed(start))
    for at in range(0, start, 10):
        made.feed("target", tokens[at : min(at + 10, start)], at)
    plain = made.feed("target", tokens[start:], start)
    got = made.feed(OBSERVER, tokens[start:], start)
    assert np.array_equal(got, plain)

    # The products of BF16 round their inputs: so does what compiled code is compared with.
    rounded = {name: with_bf16_activations(program, name).entry(name) for name in ("target", OBSERVER)}
    caches = new_caches(program)
    for entry, part, first in (("target", tokens[:start], 0), (OBSERVER, tokens[start:], start)):
        if part:
            given = torch.tensor([part]), torch.arange(first, first + len(part))[None]
            run = rounded[entry] if TABLE[isa].pairs else program.entry(entry)
            Interpreter(program, run).run(*inputs(run, *given, caches))
    wanted = caches["kv_received"].numpy()
    received = made.received["received"].reshape(wanted.shape)[..., : start + rows]
    assert np.allclose(received.sum(-1), 1, rtol=1e-5)
    off = received - wanted[..., : start + rows]
    assert np.linalg.norm(off) < 0.01 * np.linalg.norm(wanted)
    assert np.abs(off).max() < 0.01 * wanted.max()
    assert np.isnan(made.received["received"].reshape(wanted.shape)[..., start + rows :]).all()
