"""Pack the blocks that a pass makes whole, from where they lie in BF16."""

from __future__ import annotations

from typing import Any

from specqd.codegen.kernels.cache import Paged, Recent
from specqd.codegen.kernels.queries import Attention
from specqd.codegen.tir import I, bind, parallel
from specqd.manifest import BLOCK

__all__ = ["pack_blocks"]


def pack_blocks(a: Attention, cache: Paged, recent: Recent, phase: Any) -> None:
    """Emit one phase: the row with the last position of a block packs it, keys and values, from `recent` to `cache`."""
    with phase(), parallel(a.rows * a.kv_heads) as u:
        row, head = bind(u // a.kv_heads), bind(u % a.kv_heads)
        plane = bind(cache.layer * a.kv_heads + head)
        table, slot = cache.stand(plane, row)
        with I.If(slot % BLOCK == BLOCK - 1), I.Then():
            packed = bind(cache.block(plane, table, slot // BLOCK))
            plain = bind(recent.block(plane, table, slot // BLOCK))
            parts = (
                (cache.keys, cache.key_form, recent.keys, recent.key_form),
                (cache.values, cache.value_form, recent.values, recent.value_form),
            )
            for into, form, source, of in parts:
                form.pack(into, bind(packed * form.elements), of, source, bind(plain * of.elements))
