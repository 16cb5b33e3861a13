"""MXFP4 as other programs store it, read into and written from the canonical form of `mxfp4`.

    compressed-tensors   weight_packed [..., N, K/2] and weight_scale [..., N, K/32];
                         a byte holds columns 2j and 2j+1
    GPT-OSS              *_blocks [..., N, K/32, 16] and *_scales [..., N, K/32];
                         a byte holds columns 2j and 2j+1
    GGUF (type 39)       [..., N, K/32 * 17]: of each block the scale byte, then 16 bytes;
                         byte i holds columns i and i+16

All are uint8, the first column in the low nibble. Bytes are moved, never re-rounded: writing what was read
gives the same bytes, signs of zeros included. Results may share memory with what was passed in.

One thing is refused on writing: a NaN block (scale 255), because the usual readers of all three layouts take
255 as 2^128.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from specqd.errors import InputError

from .mxfp4 import BLOCK, MXFP4, SCALE_NAN, check

_PACKED: Final = BLOCK // 2  # bytes of elements in a block
_GGUF_BLOCK: Final = 1 + _PACKED


def from_compressed_tensors(weight_packed: Tensor, weight_scale: Tensor) -> MXFP4:
    """Read the two tensors of a `mxfp4-pack-quantized` module; they are the canonical form already.

    Raises:
        InputError: the tensors are not uint8, or their shapes do not belong together.
    """
    check(weight_packed, weight_scale)
    return MXFP4(weight_packed, weight_scale)


def to_compressed_tensors(matrix: MXFP4) -> tuple[Tensor, Tensor]:
    """Write `weight_packed` uint8 [..., N, K/2] and `weight_scale` uint8 [..., N, K/32].

    Raises:
        InputError: the matrix is malformed or holds a NaN block.
    """
    _check_writable(matrix, "compressed-tensors")
    return matrix.blocks, matrix.scales


def from_gpt_oss(blocks: Tensor, scales: Tensor) -> MXFP4:
    """Read `*_blocks` uint8 [..., N, K/32, 16] and `*_scales` uint8 [..., N, K/32] of a GPT-OSS checkpoint.

    N is the output dimension, as in every matrix here. transformers transposes the two last dimensions after
    decoding ([E, K, N]), because its experts multiply activations from the left.

    Raises:
        InputError: the tensors are not uint8, or their shapes do not belong together.
    """
    if blocks.ndim < 2 or blocks.shape[-1] != _PACKED:
        raise InputError(f"GPT-OSS MXFP4 blocks are [..., N, K/32, {_PACKED}], not {list(blocks.shape)}")
    canonical = blocks.flatten(-2)
    check(canonical, scales)
    return MXFP4(canonical, scales)


def to_gpt_oss(matrix: MXFP4) -> tuple[Tensor, Tensor]:
    """Write `*_blocks` uint8 [..., N, K/32, 16] and `*_scales` uint8 [..., N, K/32]; see `from_gpt_oss`.

    Raises:
        InputError: the matrix is malformed or holds a NaN block.
    """
    _check_writable(matrix, "GPT-OSS")
    return matrix.blocks.unflatten(-1, (-1, _PACKED)), matrix.scales


def from_gguf(data: Tensor) -> MXFP4:
    """Read a GGUF tensor of type 39, uint8 [..., N, K/32 * 17] as the `gguf` package gives it.

    Byte i of a block's 16 holds columns i (low nibble) and i+16 (high nibble).

    Raises:
        InputError: the tensor is not uint8, or its rows are not whole blocks.
    """
    if data.dtype != torch.uint8 or data.ndim == 0 or data.shape[-1] % _GGUF_BLOCK:
        raise InputError(
            f"GGUF MXFP4 is uint8 in rows of {_GGUF_BLOCK}-byte blocks, not {data.dtype} {list(data.shape)}; "
            "give the tensor's raw bytes, one row of the matrix a row"
        )
    block = data.unflatten(-1, (-1, _GGUF_BLOCK))
    scales, packed = block[..., 0].contiguous(), block[..., 1:]
    columns = torch.cat([packed & 15, packed >> 4], dim=-1)
    return MXFP4((columns[..., 0::2] | columns[..., 1::2] << 4).flatten(-2), scales)


def to_gguf(matrix: MXFP4) -> Tensor:
    """Write a GGUF tensor of type 39, uint8 [..., N, K/32 * 17]; see `from_gguf`.

    Raises:
        InputError: the matrix is malformed or holds a NaN block.
    """
    _check_writable(matrix, "GGUF")
    packed = matrix.blocks.unflatten(-1, (-1, _PACKED))
    columns = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    halves = columns[..., :_PACKED] | columns[..., _PACKED:] << 4
    return torch.cat([matrix.scales.unsqueeze(-1), halves], dim=-1).flatten(-2)


def _check_writable(matrix: MXFP4, layout: str) -> None:
    check(*matrix)
    nan = int((matrix.scales == SCALE_NAN).sum())
    if nan:
        raise InputError(
            f"{nan} of {matrix.scales.numel()} MXFP4 blocks are NaN, which readers of {layout} files would "
            "load as 2^128; look for NaN or infinity in the weight that was cast"
        )
