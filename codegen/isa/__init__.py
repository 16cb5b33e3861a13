"""Instruction sets: the table of what codegen can aim at, best first."""

from specqd.codegen.isa.avx2 import AVX2
from specqd.codegen.isa.avx512 import AMX, AVX512, AVX512BF16
from specqd.codegen.isa.base import ISA
from specqd.errors import InputError

__all__ = ["ISA", "TABLE", "named"]

TABLE: dict[str, ISA] = {isa.name: isa for isa in (AMX(), AVX512BF16(), AVX512(), AVX2(), ISA())}


def named(name: str, cpu_features: frozenset[str] = frozenset()) -> ISA:
    """Return the instruction set `name`; "native" is the best one that `cpu_features` allow."""
    if name == "native":
        return next(isa for isa in TABLE.values() if cpu_features.issuperset(isa.features))
    if name not in TABLE:
        raise InputError(f"no instruction set named {name!r}; known are native, {', '.join(TABLE)}")
    return TABLE[name]
