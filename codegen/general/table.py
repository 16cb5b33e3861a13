"""The table of operators: what codegen.general lowers itself; torch decomposes the rest into these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from specqd.codegen.general.operators import (
    activations,
    arithmetic,
    attention,
    convolution,
    indexing,
    joining,
    matrix,
    normalisation,
    pooling,
    quantised,
    recurrent,
    reductions,
    scans,
    scatters,
    views,
)

__all__ = ["RULES"]

RULES: dict[Any, Callable[..., Any]] = {
    **arithmetic.RULES,
    **activations.RULES,
    **views.RULES,
    **joining.RULES,
    **reductions.RULES,
    **matrix.RULES,
    **attention.RULES,
    **convolution.RULES,
    **normalisation.RULES,
    **indexing.RULES,
    **pooling.RULES,
    **quantised.RULES,
    **recurrent.RULES,
    **scans.RULES,
    **scatters.RULES,
}
"""Operator -> rule(lowering, node, *args, **kwargs): tensors come as values, dynamic sizes as TIR expressions."""
