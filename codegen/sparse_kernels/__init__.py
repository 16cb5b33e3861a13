"""Matrices with many zeros: how they are stored, when that pays, and how the dense kernels read them."""

from .choosing import Choice, choose, ranked
from .formats import FORMATS, Format
from .packing import PARTS, PRECISIONS
from .reading import Reader, Sparse

__all__ = ["FORMATS", "PARTS", "PRECISIONS", "Choice", "Format", "Reader", "Sparse", "choose", "ranked"]
