"""Fourier transforms as products with tables of waves, and complex numbers as pairs of real ones.

When a graph is traced, torch's ComplexTensor takes operators of complex tensors apart into those of their parts.
Here is what it lacks: transforms, and how complex tensors come from real ones.
"""

from __future__ import annotations

import functools
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

__all__ = ["COMPLEX", "WINDOWS", "centred_stft", "stft"]

aten = torch.ops.aten

#: elements of the longest transform by one table, which has twice the square of that: 128 MiB of float32
LONGEST = 4096
#: elements from which on a transform in two steps takes less time than one product
SHORT = 128


def _waves(length: Any, bins: int, dtype: torch.dtype) -> Tensor:
    """Return `exp(-2 pi i t k / length)` for times t and bins k: cosines and sines `[length, 2 * bins]`."""
    if length > LONGEST:
        raise CodegenError(
            f"a Fourier transform of {length} elements is not compiled: beyond {LONGEST} a length has to be a product "
            f"of two numbers from 8 to {LONGEST}; pad it to such a one"
        )
    return _turned(length, length, bins, dtype)


def _turned(length: int, times: int, bins: int, dtype: torch.dtype) -> Tensor:
    """Return the waves of so many times alone, `[times, 2 * bins]`."""
    with _disable_current_modes():
        angles = torch.outer(torch.arange(times), torch.arange(bins)) % length * (2 * math.pi / length)
        return torch.cat([angles.double().cos(), -angles.double().sin()], 1).to(dtype)


def _transformed(re: Tensor, im: Tensor | None, bins: int) -> tuple[Tensor, Tensor]:
    """Transform the last dimension forwards, and return that many bins.

    A length of r * c is transformed in two steps (Cooley and Tukey, 1965): with times c * t + u and bins k + r * l,
    over the t of each u, turned by `exp(-2 pi i u k / (r * c))`, over the u of each k.
    """
    length = re.shape[-1]
    if not isinstance(length, int):
        raise CodegenError("it transforms a dimension of open size; fix that size with dynamic_shapes")
    rows = max(n for n in range(1, math.isqrt(length) + 1) if length % n == 0) if length else 1
    if length < SHORT or rows < 8:
        return _times(re, im, _waves(length, bins, re.dtype))
    columns = length // rows

    def by_time(part: Tensor) -> Tensor:
        return part.unflatten(-1, (rows, columns)).transpose(-1, -2)

    waves = _waves(rows, rows, re.dtype)
    re, im = _times(by_time(re), None if im is None else by_time(im), waves)
    cosines, sines = _turned(length, columns, rows, re.dtype).chunk(2, 1)
    re, im = re * cosines - im * sines, re * sines + im * cosines
    last = _waves(columns, -(-bins // rows), re.dtype)
    re, im = _times(re.transpose(-1, -2), im.transpose(-1, -2), last)
    return re.transpose(-1, -2).flatten(-2)[..., :bins], im.transpose(-1, -2).flatten(-2)[..., :bins]


def _times(re: Tensor, im: Tensor | None, waves: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply `[..., length]` by waves; without imaginary parts half of it is left out."""
    cosines, sines = (re @ waves).chunk(2, -1)
    if im is None:
        return cosines, sines
    more_sines, more_cosines = (im @ waves).chunk(2, -1)[::-1]
    return cosines - more_sines, sines + more_cosines


def _r2c(x: Tensor, dim: Sequence[int], normalization: int, onesided: bool) -> ComplexTensor:
    """Transform real numbers along the last of `dim`, then the result along the others."""
    *others, last = dim
    length = x.shape[last]
    bins = length // 2 + 1 if onesided else length
    re, im = (part.movedim(-1, last) for part in _transformed(x.movedim(last, -1), None, bins))
    return _c2c(_scaled(ComplexTensor(re, im), [length], normalization), others, normalization, True)


def _c2c(x: ComplexTensor, dim: Sequence[int], normalization: int, forward: bool) -> ComplexTensor:
    """Transform along each of `dim`; backwards it is the same with the sign of the imaginary parts changed."""
    re, im = x.re, x.im if forward else -x.im
    for at in dim:
        found = _transformed(re.movedim(at, -1), im.movedim(at, -1), x.shape[at])
        re, im = (part.movedim(-1, at) for part in found)
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


def _window(operator: Any, *args: Any, **kwargs: Any) -> Tensor:
    with _disable_current_modes():
        window: Tensor = operator(*args, **kwargs)
        return window


_PACKETS = (
    aten.bartlett_window,
    aten.blackman_window,
    aten.hamming_window,
    aten.hann_window,
    aten.kaiser_window,
)
WINDOWS: dict[Any, Callable[..., Tensor]] = {
    operator: functools.partial(_window, operator)
    for packet in _PACKETS
    for operator in (getattr(packet, name) for name in packet.overloads() if not name.endswith("out"))
}
"""Operator that makes a window -> the window itself, which depends on numbers alone."""

register_complex(aten._fft_c2c, _c2c)
register_complex(aten._fft_c2r, _c2r)
register_simple(aten.roll)
register_simple(aten.unfold_backward)
