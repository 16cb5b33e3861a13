"""Other programs' MXFP4 layouts, each against that program's own decoder or an independent one."""

from collections.abc import Callable

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from gguf import quants
from torch import Tensor

from specqd.errors import InputError
from specqd.passes.quantize import formats
from specqd.passes.quantize.mxfp4 import MXFP4, decode, encode


def any_matrix(rng: torch.Generator, *lead: int, k: int = 96) -> MXFP4:
    """Every byte may occur in the elements, minus zeros included, and every scale byte but NaN."""
    blocks = torch.randint(256, (*lead, k // 2), generator=rng, dtype=torch.uint8)
    scales = torch.randint(255, (*lead, k // 32), generator=rng, dtype=torch.uint8)
    return MXFP4(blocks, scales)


def same(a: MXFP4, b: MXFP4) -> bool:
    return torch.equal(a.blocks, b.blocks) and torch.equal(a.scales, b.scales)


# compressed-tensors


def test_compressed_tensors_decodes_as_ml_dtypes_reads_it(rng: torch.Generator):
    matrix = any_matrix(rng, 40)
    packed, scale = (tensor.numpy() for tensor in formats.to_compressed_tensors(matrix))
    assert packed.shape == (40, 48) and scale.shape == (40, 3)
    # The order of compressed-tensors' own pack_fp4_to_uint8: the first element in the low nibble.
    columns = np.stack([packed & 15, packed >> 4], axis=-1).reshape(40, 3, 32).view(ml_dtypes.float4_e2m1fn)
    factor = scale.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)[..., None]
    with np.errstate(over="ignore"):
        expected = (columns.astype(np.float64) * factor).astype(np.float32).reshape(40, 96)
    read = formats.from_compressed_tensors(torch.from_numpy(packed), torch.from_numpy(scale))
    np.testing.assert_array_equal(decode(*read).numpy(), expected)


# GPT-OSS


def test_gpt_oss_decodes_as_transformers_reads_it(rng: torch.Generator):
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4", exc_type=ImportError)
    experts = encode(torch.randn(3, 40, 96, generator=rng), "search")
    blocks, scales = formats.to_gpt_oss(experts)
    assert blocks.shape == (3, 40, 3, 16) and scales.shape == (3, 40, 3)
    theirs = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(decode(*formats.from_gpt_oss(blocks, scales)).transpose(1, 2), theirs)


def test_gpt_oss_agrees_with_transformers_at_every_byte_and_scale():
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4", exc_type=ImportError)
    # transformers multiplies by 2^exponent with ldexp, which in float32 is only exact for normal factors.
    scales = torch.arange(1, 253, dtype=torch.uint8).view(1, 252, 1).expand(1, 252, 16).contiguous()
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 252, 16, 16).contiguous()
    theirs = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(decode(*formats.from_gpt_oss(blocks, scales)).transpose(1, 2), theirs)


# GGUF


def test_gguf_decodes_as_the_gguf_package_reads_it(rng: torch.Generator):
    matrix = any_matrix(rng, 400)
    data = formats.to_gguf(matrix)
    assert data.shape == (400, 3 * 17)
    with np.errstate(over="ignore"):
        theirs = quants.dequantize(data.numpy(), gguf.GGMLQuantizationType.MXFP4)
    np.testing.assert_array_equal(decode(*matrix).numpy(), theirs)


def test_gguf_agrees_at_every_byte_and_scale():
    packed = np.tile(np.arange(256, dtype=np.uint8).reshape(1, 16, 16), (255, 1, 1))
    scales = np.tile(np.arange(255, dtype=np.uint8).reshape(255, 1, 1), (1, 16, 1))
    data = np.concatenate([scales, packed], axis=-1).reshape(255, -1)
    with np.errstate(over="ignore"):
        theirs = quants.dequantize(data, gguf.GGMLQuantizationType.MXFP4)
    np.testing.assert_array_equal(decode(*formats.from_gguf(torch.from_numpy(data))).numpy(), theirs)


def test_a_weight_the_gguf_package_wrote_is_read_and_the_floor_rule_chose_the_same_scales(
    rng: torch.Generator,
):
    weight = torch.randn(50, 96, generator=rng)
    data = quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.MXFP4)
    read = formats.from_gguf(torch.from_numpy(data))
    assert torch.equal(read.scales, encode(weight, "floor").scales)
    np.testing.assert_array_equal(
        decode(*read).numpy(), quants.dequantize(data, gguf.GGMLQuantizationType.MXFP4)
    )


def test_gguf_pairs_columns_sixteen_apart():
    weight = torch.zeros(1, 32)
    weight[0, 3], weight[0, 19] = 4.0, -6.0
    assert formats.to_gguf(encode(weight)).tolist() == [[127, 0, 0, 0, 0xF6, *[0] * 12]]


# All layouts

Layout = tuple[Callable[[MXFP4], Tensor | tuple[Tensor, Tensor]], Callable[..., MXFP4]]
LAYOUTS: dict[str, Layout] = {
    "compressed-tensors": (formats.to_compressed_tensors, formats.from_compressed_tensors),
    "GPT-OSS": (formats.to_gpt_oss, formats.from_gpt_oss),
    "GGUF": (formats.to_gguf, formats.from_gguf),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lead", [(7,), (2, 5), (0,)])
def test_writing_and_reading_gives_every_byte_back(layout: str, lead: tuple[int, ...], rng: torch.Generator):
    write, read = LAYOUTS[layout]
    matrix = any_matrix(rng, *lead)
    kept = MXFP4(matrix.blocks.clone(), matrix.scales.clone())
    written = write(matrix)
    tensors = written if isinstance(written, tuple) else (written,)
    again = read(*tensors)
    assert same(again, matrix) and same(matrix, kept)
    rewritten = write(again)
    for one, other in zip(tensors, rewritten if isinstance(rewritten, tuple) else (rewritten,), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_nan_block_is_refused_on_writing(layout: str):
    weight = torch.ones(2, 64)
    weight[1, 40] = torch.nan
    with pytest.raises(InputError, match=rf"1 of 4 MXFP4 blocks are NaN, which readers of {layout}"):
        LAYOUTS[layout][0](encode(weight))


def test_a_nan_block_of_a_file_is_read_as_nan():
    data = torch.zeros(1, 17, dtype=torch.uint8)
    data[0, 0] = 255
    assert decode(*formats.from_gguf(data)).isnan().all()


@pytest.mark.parametrize(
    ("read", "why"),
    [
        (lambda: formats.from_gguf(torch.zeros(2, 18, dtype=torch.uint8)), "17-byte blocks"),
        (lambda: formats.from_gguf(torch.zeros(2, 17)), "17-byte blocks"),
        (
            lambda: formats.from_gpt_oss(
                torch.zeros(2, 3, 15, dtype=torch.uint8), torch.zeros(2, 3, dtype=torch.uint8)
            ),
            r"\[\.\.\., N, K/32, 16\]",
        ),
        (
            lambda: formats.from_gpt_oss(
                torch.zeros(2, 3, 16, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.uint8)
            ),
            "do not belong together",
        ),
        (
            lambda: formats.from_compressed_tensors(
                torch.zeros(2, 16, dtype=torch.uint8), torch.zeros(2, 16, dtype=torch.uint8)
            ),
            "do not belong together",
        ),
    ],
)
def test_tensors_of_another_shape_are_refused(read: Callable[[], MXFP4], why: str):
    with pytest.raises(InputError, match=why):
        read()
