"""Keys as the runtime reads them from a cache that compiled code has written."""

import numpy as np
import pytest
import torch
from compiled import Compiled
from test_codegen_attention import Case, attention, tokens

from specqd.cache_formats import held, rotated_back
from specqd.manifest import BLOCK
from specqd.passes.kv.quantize import QuantizeKV
from specqd.runtime.cached_keys import cached_keys


@pytest.mark.parametrize(
    ("dtype", "channels"),
    [
        *((dtype, channels) for dtype in ("bfloat16", "int8") for channels in (7, 16)),
        *((f"turbo{bits}", 96) for bits in (3, 4, 5)),
    ],
)
def test_keys_are_what_the_format_holds_of_them(dtype: str, channels: int) -> None:
    """Bit for bit: this program looks its keys up, so nothing but the format rounds them."""
    program = attention(Case(key_dim=channels, value_dim=5, capacity=48))
    if dtype != "bfloat16":
        program = QuantizeKV(keys=dtype, values="keep")(program).program
    made, text = Compiled(program), tokens(40)
    made.decode("target", text, 4)
    blocks = made.caches["kv_k"].reshape(2, made.pool, -1)[:, made.blocks[0, 3:6]]
    keys = cached_keys(dtype, blocks)
    assert keys.shape == (2, 3 * BLOCK, 2 * -(-channels // 2)) and keys.dtype == np.float32
    given = program.weights["k"][torch.tensor(text)].view(40, 2, channels).transpose(0, 1)
    got = torch.from_numpy(keys[:, :40, :channels])
    assert torch.equal(rotated_back(got) if dtype.startswith("turbo") else got, held(given, dtype))
    assert not keys[:, :40, channels:].any()
