"""A rotation of a head's channels: random signs, then a Hadamard transform, as `rotated` of specqd.cache_formats."""

from __future__ import annotations

from typing import Any

from specqd.codegen.tir import I, bind, f32, i32, load, store, tirx

__all__ = ["rotate"]

_MOST_LANES = 16


def rotate(line: Any, channels: int, signs: tuple[int, ...], *, back: bool = False) -> None:
    """Rotate float32 `[channels]` of a local buffer in place, or back; `signs` holds a bit a channel, 32 a word."""
    if not back:
        _flip(line, channels, signs)
    size = channels & -channels
    step = 1
    while step < size:
        with I.serial(0, channels // (2 * step)) as i:
            lanes = min(step, _MOST_LANES)
            with I.serial(0, step // lanes) as j:
                at = bind(i * (2 * step) + j * lanes)
                a, b = bind(load(line, at, lanes)), bind(load(line, at + step, lanes))
                store(line, at, a + b, lanes)
                store(line, at + step, a - b, lanes)
        step *= 2
    with I.serial(0, channels) as i:
        I.buffer_store(line, line[i] * f32(size**-0.5), [i])
    if back:
        _flip(line, channels, signs)


def _flip(line: Any, channels: int, signs: tuple[int, ...]) -> None:
    for first, word in zip(range(0, channels, 32), signs, strict=True):
        with I.serial(0, min(32, channels - first)) as i:
            bit = tirx.bitwise_and(tirx.shift_right(i32(word), i), i32(1))
            x = line[first + i]
            I.buffer_store(line, tirx.Select(bit == 1, x * f32(-1.0), x), [first + i])
