"""Packed: how weights are laid out for the kernels, and the arrays they become in the artifact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from specqd.codegen.kernels.dense import BLOCK
from specqd.codegen.kernels.integer import GROUP
from specqd.codegen.sparse_kernels import Format, packing
from specqd.errors import CodegenError

__all__ = ["Packed", "pack", "sparse"]


@dataclass(frozen=True)
class Packed:
    """One array of an artifact: `sources` (program weights, a layer each), their `form`, elements a layer."""

    sources: tuple[str, ...]
    form: str
    dtype: str
    size: int

    @property
    def name(self) -> str:
        """Name in the artifact: the first source, how many follow, a checksum of which, the form."""
        if len(self.sources) == 1:
            return f"{self.sources[0]}.{self.form}"
        # Layers 0, 1, 2 of one function and 0, 2, 4 of another are two arrays.
        which = crc32("\n".join(self.sources).encode())
        return f"{self.sources[0]}+{len(self.sources) - 1}-{which:08x}.{self.form}"


def _padded(weight: Tensor) -> Tensor:
    """Pad output channels to whole blocks with zeros."""
    missing = -weight.shape[0] % BLOCK
    return torch.cat([weight, weight.new_zeros(missing, *weight.shape[1:])]) if missing else weight


def _bits(weight: Tensor) -> np.ndarray:
    return weight.contiguous().view(torch.int16).numpy()


def _dense_bf16(weight: Tensor) -> np.ndarray:
    bits = _bits(_padded(weight))
    n, k = bits.shape
    return np.ascontiguousarray(bits.reshape(n // BLOCK, BLOCK, k // 2, 2).transpose(0, 2, 1, 3)).view(
        np.int32
    )


def _dense_f32(weight: Tensor) -> np.ndarray:
    w = _padded(weight).float().numpy()
    n, k = w.shape
    return np.ascontiguousarray(w.reshape(n // BLOCK, BLOCK, k).transpose(0, 2, 1))


def _mxfp4(blocks: Tensor) -> np.ndarray:
    """Canonical `[n, k/2]` (neighbours, low first) to `[n/16, k/8, 16, 4]` (j low, j + 4 high)."""
    packed = _padded(blocks).numpy()
    n, half = packed.shape
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(n // BLOCK, BLOCK, half // 4, 2, 4)
    joined = codes[..., 0, :] | (codes[..., 1, :] << 4)
    return np.ascontiguousarray(joined.transpose(0, 2, 1, 3)).view(np.int8)


def _mxfp4_scales(scales: Tensor) -> np.ndarray:
    s = _padded(scales).numpy()
    n, groups = s.shape
    return np.ascontiguousarray(s.reshape(n // BLOCK, BLOCK, groups).transpose(0, 2, 1))


def _int8(values: Tensor) -> np.ndarray:
    v = _padded(values).numpy()
    v = np.pad(v, ((0, 0), (0, -v.shape[1] % GROUP)))
    n, k = v.shape
    return np.ascontiguousarray(v.reshape(n // BLOCK, BLOCK, k // 4, 4).transpose(0, 2, 1, 3))


_FORMS: dict[str, Callable[[Tensor], np.ndarray]] = {
    "bf16": _dense_bf16,
    "f32": _dense_f32,
    "rows": _bits,
    "flat": lambda w: w.float().contiguous().numpy(),
    "ints": lambda w: w.to(torch.int32).contiguous().numpy(),
    "mxfp4": _mxfp4,
    "mxfp4_scales": _mxfp4_scales,
    "int8": _int8,
    "int8_scales": lambda s: _padded(s).float().numpy(),
}


#: form -> where its scales are NaN, which no kernel looks for
_NAN: dict[str, Callable[[Tensor], Tensor]] = {"mxfp4_scales": lambda s: s == 255, "int8_scales": torch.isnan}


def pack(packed: Packed, weights: Mapping[str, Tensor]) -> np.ndarray:
    """Lay the sources out one after another; a flat array of `packed.dtype`.

    Raises CodegenError for a quantised weight that holds NaN.
    """
    for name in packed.sources if packed.form in _NAN else ():
        if _NAN[packed.form](weights[name]).any():
            raise CodegenError(f"{name} holds NaN; repair the checkpoint before compiling it")
    layers = [_laid_out(packed, weights[name]).reshape(-1) for name in packed.sources]
    for name, layer in zip(packed.sources, layers, strict=True):
        if layer.size != packed.size or layer.dtype != np.dtype(packed.dtype):
            raise CodegenError(
                f"{name} packs to {layer.size} x {layer.dtype}, not {packed.size} x {packed.dtype}"
            )
    return layers[0] if len(layers) == 1 else np.concatenate(layers)


def sparse(sources: tuple[str, ...], kind: str, form: Format, sizes: tuple[int, int, int]) -> list[Packed]:
    """Return the arrays of a stack of weights of a precision in a format, in the order of `PARTS`."""
    precision = packing.PRECISIONS[kind]
    dtypes = (f"int{precision.bits}", f"uint{8 * form.mask_bytes(precision.inputs)}", "int32")
    return [
        Packed(sources, f"{kind}-{form.name}-{part}", dtype, size)
        for part, dtype, size in zip(packing.PARTS, dtypes, sizes, strict=True)
    ]


def _laid_out(packed: Packed, weight: Tensor) -> np.ndarray:
    if packed.form in _FORMS:
        return _FORMS[packed.form](weight)
    return packing.part(packed.form, weight, packed.size)
