"""Score, then keep: which slots of a layer's cache stay, and how many in each layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from specqd.errors import InputError
from specqd.selection.method import Method
from specqd.selection.observed import Ints, Observed

__all__ = ["RECENT", "SINKS", "keep", "layer_budgets"]

SINKS = 4  # tokens that draw attention whatever they say (StreamingLLM, arXiv 2309.17453, section 3.1)
RECENT = 32

_SHOWN = {
    "received": "attention that tokens received",
    "newest": "attention of the newest query alone",
    "rope": "RoPE's angles",
}


def keep(
    method: Method, observed: Observed, budget: int, *, sinks: int = SINKS, recent: int = RECENT
) -> Ints:
    """Choose the tokens of one layer's cache that stay.

    The first `sinks` and the last `recent` slots always do; `method` chooses the rest among those in between.

    Returns:
        int32 [kv_heads, min(budget, T)], ascending slots: the same number for each KV head.

    Raises:
        InputError: `budget` does not hold what always stays, or `observed` lacks what `method` needs.
    """
    if budget < sinks + recent:
        raise InputError(
            f"layer {observed.layer}: a budget of {budget} tokens is less than the {sinks} first and {recent} last "
            "tokens that always stay; give more tokens, or fewer sinks or recent tokens"
        )
    _demand(method, observed)
    length = observed.length
    if budget >= length:
        return np.tile(np.arange(length, dtype=np.int32), (observed.heads, 1))
    slots = np.empty((observed.heads, budget), np.int32)
    slots[:, :sinks] = np.arange(sinks)
    slots[:, sinks : sinks + recent] = np.arange(length - recent, length)
    slots[:, sinks + recent :] = method.choose(
        observed, slice(sinks, length - recent), budget - sinks - recent
    )
    slots.sort(axis=1)
    return slots


def layer_budgets(
    method: Method, layers: int, total: int, *, length: int, sinks: int = SINKS, recent: int = RECENT
) -> Sequence[int]:
    """Divide `total` tokens among the `layers` of a model, as `method` does, for caches of `length` tokens.

    The budgets sum up to `total`, and each is from `sinks + recent` to `length`.

    Raises:
        InputError: `total` is outside of what that allows.
    """
    always = min(sinks + recent, length)
    if not always * layers <= total <= length * layers:
        raise InputError(
            f"cannot divide {total} tokens among {layers} layers of {always} to {length} tokens each; "
            f"give {always * layers} to {length * layers}"
        )
    shares = method.shares(layers, total / layers - always, length - always)
    # Rounding the sums instead of the shares keeps the total.
    ends = np.rint(np.cumsum(shares)).astype(int)
    return [always + int(share) for share in np.diff(ends, prepend=0)]


def _demand(method: Method, observed: Observed) -> None:
    for need in method.needs:
        if need in ("received", "newest"):
            measured = observed.measured is not None and (need == "received" or observed.window == 1)
            there = measured or not (observed.keys is None or observed.queries is None)
        else:
            there = getattr(observed, need) is not None
        if not there:
            why = "; a model without RoPE has none" if need == "rope" else ""
            raise InputError(
                f"layer {observed.layer}: {method.name} needs the {_SHOWN.get(need, need)}, which the cache does "
                f"not show{why}. Choose a method that needs none, such as streaming-llm, or supply them"
            )
