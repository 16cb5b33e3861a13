"""How activations and weights lie in memory: channels in blocks, words of four bytes.

An activation of `[batch, channels, height, width]` is `[batch, blocks, height, width, block]`, a block being
a cache line where there are enough channels: 16 float32, 32 BF16, 64 integers. A weight is cut into blocks of
16 output channels; inside one come blocks of input channels, taps, words of a block, and then 16 output
channels times the inputs of a word.
"""

from __future__ import annotations

import numpy as np

from specqd.codegen.dense_kernels.spec import PER_WORD, ConvSpec, GemmSpec
from specqd.codegen.isa.base import ISA
from specqd.errors import InputError

__all__ = [
    "OUT", "PATCH", "POSITIONS", "block", "blocked_shape", "by_lane", "by_winograd", "corrections", "fits_tiles",
    "pack_channels", "pack_conv", "pack_gemm", "pieces", "taps",
]  # fmt: skip

#: output channels in a block of a weight
OUT = 16
#: rows and columns of inputs of a tile of Winograd's convolution, and how many places it so has
PATCH, POSITIONS = 4, 16
#: weights g of three taps in a row become Gg
_TAPS = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
#: words in a block of a matrix product: what a core keeps in its first cache of a few blocks of weights
_GEMM = 128
#: words of inputs for which a tile is worth its time, and that it can take
_LEAST, _MOST = 4, 16


def block(channels: int, dtype: str) -> int:
    """Return how many channels a block of an activation holds."""
    return min(16 * PER_WORD[dtype], -(-channels // OUT) * OUT)


def blocked_shape(batch: int, channels: int, height: int, width: int, dtype: str) -> tuple[int, ...]:
    """Return the shape of an activation in blocks."""
    size = block(channels, dtype)
    return batch, -(-channels // size), height, width, size


def by_lane(spec: ConvSpec) -> bool:
    """Say whether a lane has inputs of its own: depthwise, and groups that do not fill blocks."""
    inputs, outputs = spec.in_channels // spec.groups, spec.out_channels // spec.groups
    return spec.groups > 1 and (inputs % block(spec.in_channels, spec.dtype) > 0 or outputs % OUT > 0)


def by_winograd(spec: ConvSpec) -> bool:
    """Say whether a convolution is computed by Winograd's algorithm: 3 x 3 taps, enough channels and pixels."""
    plain = spec.stride == spec.dilation == (1, 1) and spec.groups == 1 and not spec.planes
    enough = min(spec.in_channels, spec.out_channels) >= OUT and min(spec.out_height, spec.out_width) >= PATCH
    return spec.dtype == "float32" and spec.kernel == (3, 3) and plain and enough


def pieces(spec: ConvSpec | GemmSpec) -> tuple[int, int]:
    """Return the words of a group's inputs, and how many a block holds; the last block may hold fewer."""
    per = PER_WORD[spec.dtype]
    if isinstance(spec, GemmSpec):
        return spec.k // per, _GEMM
    words = -(-(spec.in_channels // spec.groups) // per)
    if spec.planes:
        words *= spec.kernel[1] // taps(spec)[1]
        return words, words
    return words, block(spec.in_channels, spec.dtype) // per


def taps(spec: ConvSpec) -> tuple[int, int]:
    """Return rows and columns of taps; where pixels are put together of planes, a row of taps is one, of more words."""
    height, width = spec.kernel
    joined = spec.planes and PER_WORD[spec.dtype] > 1 and spec.dilation[1] == 1
    return height, 1 if joined else width


def fits_tiles(spec: ConvSpec | GemmSpec, isa: ISA) -> bool:
    """Say whether the product is one for tiles of AMX: not of float32, blocks of inputs of 16 to 64 bytes."""
    if not isa.tiles or spec.dtype == "float32":
        return False
    return isinstance(spec, GemmSpec) or (
        not by_lane(spec) and min(pieces(spec)) >= _LEAST and pieces(spec)[1] <= _MOST
    )


def pack_conv(spec: ConvSpec, weight: np.ndarray) -> np.ndarray:
    """Lay out a weight `[out_channels, in_channels / groups, kernel height, kernel width]`.

    BF16 comes as its bits, in int16 or uint16. The result is `[blocks of 16 out, words of all blocks of
    inputs and taps, 16, inputs of a word]`, or for kernels that work by lane `[blocks of 16 out, inputs of a
    group, taps, 16]`, or for Winograd's `[16 positions * blocks of 16 out, inputs, 16, 1]`; padding is zero.

    Raises:
        InputError: the shape is not what `spec` says.
    """
    expected = (spec.out_channels, spec.in_channels // spec.groups, *spec.kernel)
    if weight.shape != expected:
        raise InputError(f"the weight is {weight.shape}, and the convolution wants {expected}")
    if by_winograd(spec):
        places = (_TAPS @ weight.astype(np.float64) @ _TAPS.T).astype(np.float32)
        return np.concatenate(
            [_words(spec, places[..., i, j, None]) for i in range(PATCH) for j in range(PATCH)]
        )
    flat = weight.reshape(*expected[:2], -1)
    if by_lane(spec):
        cut = _whole(flat, OUT).reshape(-1, OUT, *flat.shape[1:])
        return np.ascontiguousarray(cut.transpose(0, 2, 3, 1))
    return _words(spec, flat)


def pack_gemm(spec: GemmSpec, weight: np.ndarray) -> np.ndarray:
    """Lay out a weight `[n, k]` as `[blocks of 16 out, words, 16, inputs of a word]`.

    Raises:
        InputError: the shape is not what `spec` says.
    """
    if weight.shape != (spec.n, spec.k):
        raise InputError(f"the weight is {weight.shape}, and the product wants {(spec.n, spec.k)}")
    return _words(spec, weight[..., None])


def pack_channels(values: np.ndarray) -> np.ndarray:
    """Pad a value a channel (bias, scale, correction) to whole blocks, with zeros."""
    return _whole(values, OUT)


def corrections(spec: ConvSpec | GemmSpec, weight: np.ndarray, isa: ISA) -> np.ndarray:
    """Return what integer kernels add to the sums of each output channel: int32 `[whole blocks]`.

    The sum of `(x - zero) * w` is that of `x * w` less `zero * sum(w)`. All kernels but those in tiles read signed
    inputs as `x + 128`; those that work by lane take `zero` off the inputs.
    """
    if isinstance(spec, ConvSpec) and by_lane(spec):
        return np.zeros(-(-len(weight) // OUT) * OUT, np.int32)
    shifted = spec.dtype == "int8" and not fits_tiles(spec, isa)
    offset = spec.zero + (128 if shifted else 0)
    total = weight.astype(np.int64).reshape(len(weight), -1).sum(1)
    return pack_channels((-offset * total).astype(np.int32))


def _whole(array: np.ndarray, size: int, axis: int = 0) -> np.ndarray:
    missing = [(0, 0)] * array.ndim
    missing[axis] = (0, -array.shape[axis] % size)
    return np.ascontiguousarray(np.pad(array, missing))


def _words(spec: ConvSpec | GemmSpec, flat: np.ndarray) -> np.ndarray:
    """`[out, in, taps]` to `[out / 16, blocks * taps * words, 16, inputs of a word]`."""
    per = PER_WORD[spec.dtype]
    whole = _whole(_whole(flat, OUT), per, 1)
    cut = whole.reshape(-1, OUT, whole.shape[1] // per, per, flat.shape[2]).transpose(0, 4, 2, 1, 3)
    words, size = cut.shape[2], pieces(spec)[1]
    blocks = [cut[:, :, first : first + size] for first in range(0, words, size)]
    return np.ascontiguousarray(np.concatenate([b.reshape(len(cut), -1, OUT, per) for b in blocks], 1))
