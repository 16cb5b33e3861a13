"""Rules of ONNX operators by topic; importing this fills the table of specqd.frontends.onnx.rules."""

from . import (
    attention,
    convolution,
    elementwise,
    images,
    indexing,
    joining,
    matrix,
    normalisation,
    pooling,
    quantisation,
    recurrent,
    reductions,
    sampling,
    scatters,
    shapes,
    signal,
    types,
)

__all__ = [
    "attention", "convolution", "elementwise", "images", "indexing", "joining", "matrix", "normalisation", "pooling",
    "quantisation", "recurrent", "reductions", "sampling", "scatters", "shapes", "signal", "types",
]  # fmt: skip
