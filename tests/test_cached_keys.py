"""Keys as the runtime reads them from a cache that compiled code has written."""

import numpy as np
import pytest
import torch
from compiled import Compiled
from test_codegen_attention import Case, attention, tokens

from specqd.cache_formats import held
from specqd.manifest import BLOCK
from specqd.passes.kv.quantize import QuantizeKV
from specqd.runtime.cached_keys import cached_keys


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("channels", [7, 16])
def test_keys_are_what_the_format_holds_of_them(dtype: str, channels: int) -> None:
    """Bit for bit: this program looks its keys up, so nothing but the format rounds them."""
    program = attention(Case(key_dim=channels, value_dim=5, capacity=48))
    if dtype == "int8":
        program = QuantizeKV()(program).program
    made, text = Compiled(program), tokens(40)
    made.decode("target", text, 4)
    blocks = made.caches["kv_k"].reshape(2, made.pool, -1)[:, made.blocks[0, 3:6]]
    keys = cached_keys(dtype, blocks)
    assert keys.shape == (2, 3 * BLOCK, 2 * -(-channels // 2)) and keys.dtype == np.float32
    given = program.weights["k"][torch.tensor(text)].view(40, 2, channels).transpose(0, 1)
    assert np.array_equal(keys[:, :40, :channels], held(given, dtype).numpy())
    assert not keys[:, :40, channels:].any()
