"""Fourier transforms as products with tables of waves, and complex numbers as pairs of real ones.

When a graph is traced, torch's ComplexTensor takes operators of complex tensors apart into those of their parts.
Here is what it lacks: transforms, and how complex tensors come from real ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.complex_tensor import ComplexTensor
from torch._subclasses.complex_tensor._ops.common import (
    complex_to_real_dtype,
    register_complex,
    register_simple,
)
from torch.utils._python_dispatch import _disable_current_modes

from specqd.errors import CodegenError

__all__ = ["COMPLEX", "centred_stft", "stft"]

aten = torch.ops.aten

#: elements of the longest transform; its table has twice the square of that, 128 MiB of float32
LONGEST = 4096


def _waves(length: int, bins: int, dtype: torch.dtype) -> Tensor:
    """Return `exp(-2 pi i t k / length)` for times t and bins k: cosines and sines `[length, 2 * bins]`."""
    if not isinstance(length, int):
        raise CodegenError("it transforms a dimension of open size; fix that size with dynamic_shapes")
    if length > LONGEST:
        raise CodegenError(
            f"a Fourier transform of {length} elements is not compiled, {LONGEST} are the most"
        )
    with _disable_current_modes():
        angles = torch.outer(torch.arange(length), torch.arange(bins)) % length * (2 * math.pi / length)
        return torch.cat([angles.double().cos(), -angles.double().sin()], 1).to(dtype)


def _r2c(x: Tensor, dim: Sequence[int], normalization: int, onesided: bool) -> ComplexTensor:
    """Transform real numbers along the last of `dim`, then the result along the others."""
    *others, last = dim
    length = x.shape[last]
    bins = length // 2 + 1 if onesided else length
    found = x.movedim(last, -1) @ _waves(length, bins, x.dtype)
    re, im = (part.movedim(-1, last) for part in (found[..., :bins], found[..., bins:]))
    return _c2c(_scaled(ComplexTensor(re, im), [length], normalization), others, normalization, True)


def _c2c(x: ComplexTensor, dim: Sequence[int], normalization: int, forward: bool) -> ComplexTensor:
    """Transform along each of `dim`; backwards it is the same with the sign of the imaginary parts changed."""
    re, im = x.re, x.im if forward else -x.im
    for at in dim:
        length = x.shape[at]
        waves = _waves(length, length, re.dtype)
        a, b = (part.movedim(at, -1) @ waves for part in (re, im))
        re = (a[..., :length] - b[..., length:]).movedim(-1, at)
        im = (a[..., length:] + b[..., :length]).movedim(-1, at)
    return _scaled(ComplexTensor(re, im if forward else -im), [x.shape[at] for at in dim], normalization)


def _c2r(x: ComplexTensor, dim: Sequence[int], normalization: int, last_dim_size: int) -> Tensor:
    """Find the real numbers of that length whose transform begins as `x` does along the last of `dim`."""
    *others, last = dim
    x = _c2c(x, others, normalization, False)
    bins = last_dim_size // 2 + 1
    waves = _waves(last_dim_size, bins, x.re.dtype)
    # All but the first and the middle bin stand for their mirror images too.
    twice = torch.full((bins,), 2.0, dtype=x.re.dtype, device=x.re.device)
    ends = torch.arange(bins, device=x.re.device) * 2 % last_dim_size == 0
    twice = torch.where(ends, 1.0, twice)
    parts = torch.cat([part.movedim(last, -1)[..., :bins] * twice for part in (x.re, x.im)], -1)
    return _scaled((parts @ waves.T).movedim(-1, last), [last_dim_size], normalization)


def _scaled(x: Any, lengths: Sequence[int], normalization: int) -> Any:
    """Normalise by nothing (0), the root (1) or the whole (2) of the number of elements, as torch numbers it."""
    by = math.prod(lengths) ** {0: 0.0, 1: -0.5, 2: -1.0}[normalization]
    return x if by == 1 else x * by


def stft(
    x: Tensor, n_fft: int, hop_length: int | None = None, win_length: int | None = None,
    window: Tensor | None = None, normalized: bool = False, onesided: bool | None = None,
    return_complex: bool | None = None, align_to_window: bool | None = None,
) -> Tensor:  # fmt: skip
    """Transform windows of `x [..., time]` into `[..., bins, frames]`; torch's own way writes into what it made."""
    frames = x.unfold(-1, n_fft, n_fft // 4 if hop_length is None else hop_length)
    width = n_fft if win_length is None else win_length
    if window is None:
        window = x.new_ones(width)
    before = (n_fft - width) // 2
    frames = frames * torch.nn.functional.pad(window, (before, n_fft - width - before))
    found = torch.ops.aten._fft_r2c(frames, [frames.dim() - 1], int(normalized), onesided is not False)
    found = found.transpose(-1, -2)
    return found if return_complex else torch.view_as_real(found)


def centred_stft(
    x: Tensor, n_fft: int, hop_length: int | None = None, win_length: int | None = None,
    window: Tensor | None = None, center: bool = True, pad_mode: str = "reflect", *rest: Any, **named: Any,
) -> Tensor:  # fmt: skip
    """Transform windows around every `hop_length`-th element."""
    if center:
        pad = (n_fft // 2, n_fft // 2)
        x = torch.nn.functional.pad(x.reshape(1, -1, x.shape[-1]), pad, pad_mode).reshape(*x.shape[:-1], -1)
    return stft(x, n_fft, hop_length, win_length, window, *rest, **named)


def _to_copy(x: Tensor, *, dtype: torch.dtype | None = None, **_: Any) -> Any:
    if dtype is None or not dtype.is_complex:
        return NotImplemented
    real = x.to(complex_to_real_dtype(dtype))
    return ComplexTensor(real, torch.zeros_like(real))


def _view_as_complex(x: Tensor) -> ComplexTensor:
    return ComplexTensor(*x.unbind(-1))


COMPLEX: dict[Any, Callable[..., Any]] = {
    aten._fft_r2c.default: _r2c,
    aten._to_copy.default: _to_copy,
    aten.complex.default: ComplexTensor,
    aten.view_as_complex.default: _view_as_complex,
}
"""Operator that makes complex tensors of real ones -> the same with a ComplexTensor as its result."""

register_complex(aten._fft_c2c, _c2c)
register_complex(aten._fft_c2r, _c2r)
register_simple(aten.roll)
