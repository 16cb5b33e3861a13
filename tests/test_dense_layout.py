"""Blocks of channels: converters against plain reshaping, and what kernels are made of on each instruction set."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from compiled import array, assembly, jit
from dense_cases import KINDS, argument, blocked, plain

from specqd.codegen.dense_kernels import ConvSpec, block, blocked_shape, conv2d, from_blocks, to_blocks
from specqd.codegen.isa import TABLE

SHAPES = [(1, 3, 5, 7), (2, 40, 3, 6), (1, 80, 4, 4), (1, 16, 1, 1)]


@pytest.mark.parametrize(("isa", "dtype"), [k for k in KINDS if k[1] == "float32" or k[0] == "generic"])
def test_there_and_back(isa: str, dtype: str, rng: torch.Generator) -> None:
    functions: dict[str, Any] = {}
    for i, shape in enumerate(SHAPES):
        functions[f"to{i}"] = to_blocks(shape, dtype, TABLE[isa], f"to{i}")
        functions[f"from{i}"] = from_blocks(shape, dtype, TABLE[isa], f"from{i}")
    compiled = jit(functions, TABLE[isa])
    for i, shape in enumerate(SHAPES):
        x = torch.randint(0, 255, shape, generator=rng).float()
        kind = {"bfloat16": torch.bfloat16, "float32": torch.float32, "uint8": torch.uint8}[dtype]
        stored = (x.to(kind).view(torch.uint16) if dtype == "bfloat16" else x.to(kind)).numpy()
        there, back = array(blocked_shape(*shape, dtype), stored.dtype.name), array(shape, stored.dtype.name)
        there.view(np.uint8)[...] = 0xFF
        compiled[f"to{i}"](argument(stored), argument(there))
        channels = np.arange(there.shape[1] * there.shape[4]).reshape(-1, 1, 1, there.shape[4]) < shape[1]
        expected = np.where(channels, blocked(x, dtype), 0)
        assert np.array_equal(there, expected)
        compiled[f"from{i}"](argument(there), argument(back))
        assert np.array_equal(back, stored)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8", "int8"])
@pytest.mark.parametrize("channels", [1, 15, 16, 17, 64, 65])
def test_a_block_is_a_cache_line_or_all_channels(dtype: str, channels: int) -> None:
    size = block(channels, dtype)
    bytes_of = {"float32": 4, "bfloat16": 2}.get(dtype, 1)
    assert size % 16 == 0 and (size * bytes_of == 64 or channels <= size < 64 // bytes_of)
    x = torch.arange(channels * 6).reshape(1, channels, 2, 3).float()
    kept = torch.from_numpy(blocked(x, "float32"))
    assert torch.equal(plain(kept, channels), x)


#: input type -> what its products are done with
INSTRUCTIONS = {
    "generic": {"float32": r"mulps.*%xmm", "bfloat16": r"mulps.*%xmm", "uint8": r"%xmm"},
    "avx2": {"float32": r"vfmadd\w+ps.*%ymm", "bfloat16": r"vfmadd\w+ps.*%ymm", "uint8": r"vpmaddwd.*%ymm"},
    "avx512": {"float32": r"vfmadd\w+ps.*%zmm", "bfloat16": r"vfmadd\w+ps.*%zmm", "uint8": r"vpmaddwd.*%zmm"},
    "avx512_bf16": {
        "float32": r"vfmadd\w+ps.*%zmm",
        "bfloat16": r"vdpbf16ps.*%zmm",
        "uint8": r"vpdpbusd.*%zmm",
    },
    "amx": {"float32": r"vfmadd\w+ps.*%zmm", "bfloat16": r"tdpbf16ps", "uint8": r"tdpbusd"},
}


@pytest.mark.parametrize("isa", TABLE)
def test_products_use_what_the_instruction_set_has(isa: str) -> None:
    functions = {
        dtype: conv2d(ConvSpec(1, 64, 4, 14, 32, dtype=dtype), TABLE[isa], dtype)  # type: ignore[arg-type]
        for dtype in INSTRUCTIONS[isa]
    }
    for dtype, function in functions.items():
        text = assembly({dtype: function}, TABLE[isa])
        assert re.search(INSTRUCTIONS[isa][dtype], text), (isa, dtype)
        assert not re.search(r"\bcallq?\s+(fmaf?|nearbyintf|roundf)", text)
