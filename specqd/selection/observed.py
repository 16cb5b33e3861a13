"""What one layer's cache shows when it is compressed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias, cast

import numpy as np
import numpy.typing as npt

from specqd.errors import InputError

__all__ = ["Floats", "Ints", "Observed", "compact"]

Floats: TypeAlias = npt.NDArray[np.float32]
Ints: TypeAlias = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Observed:
    """One layer's cache of T tokens, and what the queries of its last `window` tokens see in it.

    A slot is a place in the cache, a position one in the text: they differ after an earlier selection. Whoever
    compresses gives what the method `needs`.

    Attributes:
        positions: int32 [kv_heads, T], ascending in each head; the text's newest tokens are in the last slots.
        keys: float32 [kv_heads, T, D], after RoPE.
        values: float32 [kv_heads, T, Dv].
        queries: float32 [kv_heads, group, window, D] of the last tokens, after RoPE.
        scale: what the products of queries and keys are multiplied by before softmax.
        rope: float32 [D / 2], the angle in radians by which a position turns each pair (i, i + D / 2) of dimensions.
        measured: float32 [kv_heads, T], what `received` is, from code that does not hand out queries.
        window: the number of last tokens whose queries were seen; follows from `queries` if they are given.
        carried: float32 [kv_heads, T], what `Method.carry` returned at the last selection, compacted like the cache
            and zero for tokens since.
        layer: which of the model's `layers` this is, from 0.
        layers: layers of the model.

    Raises:
        InputError: the arrays do not fit together.
    """

    positions: Ints
    keys: Floats | None = None
    values: Floats | None = None
    queries: Floats | None = None
    scale: float = 1.0
    rope: Floats | None = None
    measured: Floats | None = None
    window: int = 0
    carried: Floats | None = None
    layer: int = 0
    layers: int = 1

    def __post_init__(self) -> None:
        """Check the shapes, which come from several places."""
        for name in ("keys", "values", "measured", "carried"):
            array = getattr(self, name)
            if array is not None and array.shape[:2] != self.positions.shape:
                raise InputError(
                    f"layer {self.layer}: {name} are of {array.shape[:2]} heads and tokens, the positions of "
                    f"{self.positions.shape}; give both of the same cache"
                )
        if self.queries is not None:
            if len(self.queries) != self.heads or self.queries.shape[2] > self.length:
                raise InputError(
                    f"layer {self.layer}: queries of shape {self.queries.shape} do not fit {self.heads} KV heads with "
                    f"{self.length} tokens; give [kv_heads, group, window, D] of the last tokens"
                )
            object.__setattr__(self, "window", self.queries.shape[2])
        if self.rope is not None and self.keys is not None and 2 * len(self.rope) != self.keys.shape[2]:
            raise InputError(
                f"layer {self.layer}: RoPE turns {len(self.rope)} pairs of keys of {self.keys.shape[2]} dimensions; "
                "only RoPE of whole keys is understood: leave it out, and choose a method that does not need it"
            )

    @property
    def heads(self) -> int:
        """KV heads."""
        return self.positions.shape[0]

    @property
    def length(self) -> int:
        """Tokens in the cache, T."""
        return self.positions.shape[1]

    @cached_property
    def attention(self) -> Floats:
        """Causal softmax of the last queries over all keys, float32 [kv_heads, group, window, T]."""
        keys, queries = cast(Floats, self.keys), cast(Floats, self.queries)
        logits: Floats = np.matmul(queries * np.float32(self.scale), keys[:, None].swapaxes(-1, -2))
        newest = np.arange(self.length - self.window, self.length)
        logits[..., np.arange(self.length) > newest[:, None]] = -np.inf
        logits -= logits.max(axis=-1, keepdims=True)
        np.exp(logits, out=logits)
        logits /= logits.sum(axis=-1, keepdims=True)
        return logits

    @cached_property
    def newest(self) -> Floats:
        """Attention that each token gets from the newest query, mean over the group, float32 [kv_heads, T].

        What was `measured` is that if its window was 1.
        """
        if self.measured is not None and self.window == 1:
            return self.measured
        return self.attention[:, :, -1].mean(axis=1)

    @cached_property
    def received(self) -> Floats:
        """Attention that each token gets from a query, mean over group and window, float32 [kv_heads, T]."""
        if self.measured is not None:
            return self.measured
        return self.attention.mean(axis=(1, 2))


def compact(array: npt.NDArray, slots: Ints) -> npt.NDArray:
    """Return [kv_heads, budget, ...] of `array` [kv_heads, T, ...]: what stood in `slots` [kv_heads, budget]."""
    return array[np.arange(len(slots))[:, None], slots]
