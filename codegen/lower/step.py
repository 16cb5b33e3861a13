"""Step: the context in which one function is emitted; parameters, scratch, phases, and turning values into buffers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import prod
from typing import Any, Literal

from specqd.codegen.isa.base import ISA
from specqd.codegen.kernels.activations import bf16_bits, quantise
from specqd.codegen.kernels.integer import GROUP
from specqd.codegen.lower.values import Space, Value, of_buffer, unravel
from specqd.codegen.pack import Packed
from specqd.codegen.tir import I, i32, local, parallel, tirx
from specqd.errors import CodegenError

__all__ = ["INT32", "Parameter", "Step"]

#: elements from which a stack of layers is indexed in 64 bits
INT32 = 2**31

Kind = Literal[
    "tokens", "positions", "tables", "blocks", "next", "sums", "logits", "received", "cache", "recent", "scratch",
    "weight",
]  # fmt: skip


@dataclass(frozen=True)
class Parameter:
    """One argument of the compiled function, in order.

    The shape of a cache is that of one block of positions, that of `recent` blocks is those of one sequence; the buffer
    has as many as the caller likes.
    """

    name: str
    kind: Kind
    dtype: str
    shape: tuple[int, ...]
    buffer: Any = field(compare=False)
    packed: Packed | None = None
    gathered: bool = False


class Step:
    """Emission state of one function over `rows` tokens for one instruction set."""

    def __init__(self, isa: ISA, rows: int, profile: bool = False) -> None:
        """Start with no parameters and nothing known; with `profile`, cycles are counted phase by phase."""
        self.isa, self.rows = isa, rows
        self.space = Space()
        self.parameters: dict[str, Parameter] = {}
        self.iteration: Any = None
        self._operands: dict[tuple[int, str], Any] = {}
        self._keep: list[Value] = []
        self._unfenced: set[Any] = set()
        self.label = ""
        self.phases: list[str] = []
        self._cycles = self.parameter("cycles", "scratch", "int64", (512,)) if profile else None

    # -- parameters ---------------------------------------------------------------------------------------------

    def parameter(
        self, name: str, kind: Kind, dtype: str, shape: tuple[int, ...], packed: Packed | None = None
    ) -> Any:
        """Return the flat buffer of an argument, declaring it on first use; `shape` is the caller's view."""
        if name not in self.parameters:
            if packed is not None and packed.size >= INT32:
                raise CodegenError(
                    f"{packed.sources[0]} packs to {packed.size} elements; kernels index below {INT32}"
                )
            buffer = tirx.decl_buffer((prod(shape),), dtype, _identifier(name))
            self.parameters[name] = Parameter(name, kind, dtype, (prod(shape),), buffer, packed)
        return self.parameters[name].buffer

    def weight(self, packed: Packed, gathered: bool = False) -> tuple[Any, Any]:
        """Return (buffer, first element) of a packed weight; in a layer loop the element moves with the layer.

        `gathered`: only one row a token is read here, so the whole does not count as bytes moved.
        """
        known = self.parameters.get(packed.name)
        buffer = self.parameter(
            packed.name, "weight", packed.dtype, (packed.size * len(packed.sources),), packed
        )
        only = gathered and (known is None or known.gathered)
        self.parameters[packed.name] = replace(self.parameters[packed.name], gathered=only)
        if self.iteration is None or len(packed.sources) == 1:
            return buffer, i32(0)
        if packed.size * len(packed.sources) < INT32:
            return buffer, self.iteration * packed.size
        return buffer, tirx.Cast("int64", self.iteration) * tirx.const(packed.size, "int64")

    def cache(self, name: str, dtype: str, planes: int, size: int, kind: Kind = "cache") -> Any:
        """Return the flat buffer of a cache: `planes` of any number of blocks of positions, `size` elements each."""
        return self._sized(name, kind, dtype, (planes, size), tirx.Var(f"{_identifier(name)}_size", "int32"))

    def blocks(self) -> Any:
        """Return the buffer of block tables, of any size."""
        return self._sized("blocks", "blocks", "int32", (1,), tirx.Var("blocks_size", "int32"))

    def _sized(self, name: str, kind: Kind, dtype: str, shape: tuple[int, ...], size: Any) -> Any:
        """Declare an argument whose number of elements is known when it is called."""
        if name not in self.parameters:
            buffer = tirx.decl_buffer((size,), dtype, _identifier(name))
            self.parameters[name] = Parameter(name, kind, dtype, shape, buffer)
        return self.parameters[name].buffer

    def scratch(self, size: int, dtype: str) -> Any:
        """Return a new scratch buffer, an argument of its own."""
        count = sum(p.kind == "scratch" for p in self.parameters.values())
        return self.parameter(f"scratch{count}_{dtype}", "scratch", dtype, (size,))

    # -- phases -------------------------------------------------------------------------------------------------

    @contextmanager
    def phase(self) -> Iterator[None]:
        """Open a phase: parallel loops inside it, a barrier after it."""
        self._unfenced.clear()
        with I.attr(0, "pragma_parallel_barrier_when_finish", 1):
            yield
        if self._cycles is not None:
            self._count(self._cycles)

    def _count(self, cycles: Any) -> None:
        """Add the cycles since the last phase's end to this phase's slot; slot 0 holds the time of that end."""
        self.phases.append(self.label)
        slot = len(self.phases)
        now = I.bind(tirx.call_llvm_intrin("int64", "llvm.readcyclecounter"))
        I.buffer_store(cycles, cycles[slot] + now - cycles[0], [slot])
        I.buffer_store(cycles, now, [0])

    def private_read(self, buffer: Any) -> None:
        """Note that every thread reads `buffer` outside a phase, so the next phase must not write it."""
        self._unfenced.add(buffer)

    def fence(self, buffer: Any) -> None:
        """Wait for all threads if one may still be reading `buffer` on its own."""
        if buffer in self._unfenced:
            with self.phase():
                I.evaluate(0)

    @contextmanager
    def parallel(self, extent: int) -> Iterator[Any]:
        """Open a parallel loop whose variable's range is known."""
        with parallel(extent) as var:
            yield self.space.bound(var, extent)

    @contextmanager
    def serial(self, extent: int) -> Iterator[Any]:
        """Open a serial loop whose variable's range is known."""
        with I.serial(0, extent) as var:
            yield self.space.bound(var, extent)

    def over(self, start: Any, size: int, vectorises: bool, body: Any) -> None:
        """Run `body(i)` for i in [start, start + size), in vectors as far as they go."""
        lanes = self.isa.lanes if vectorises else 1
        full = size // lanes if lanes > 1 else 0
        if full:
            with self.serial(full) as s, I.vectorized(0, lanes) as v:
                body(start + s * lanes + self.space.bound(v, lanes))
        rest = size - full * lanes
        if rest:
            with self.serial(rest) as r:
                body(start + full * lanes + r)

    # -- values into buffers ------------------------------------------------------------------------------------

    def materialise(self, value: Value, into: Any = None) -> Value:
        """Return a plain buffer of the value, computed in one phase unless it is one (or `into` is given)."""
        if value.buffer is not None and into is None:
            return value
        dtype = "int32" if value.dtype == "bool" else value.dtype
        buffer = self.scratch(value.size, dtype) if into is None else into
        self.fence(buffer)
        shape = value.shape or (1,)
        with self.phase():
            for low, high in _pieces(shape[-1], value.breaks):
                self._fill_piece(value, shape, low, high, buffer)
        return of_buffer(self.space, buffer, value.shape, dtype)

    def _fill_piece(self, value: Value, shape: tuple[int, ...], low: int, high: int, buffer: Any) -> None:
        rows, size = prod(shape[:-1]), high - low
        chunk = next((c for c in (256, 192, 128, 96, 64, 48, 32) if size % c == 0), size)
        with self.parallel(rows * (size // chunk)) as u:
            row = self.space.simplify(u // (size // chunk))
            first = self.space.simplify((u % (size // chunk)) * chunk + low)
            lead = unravel(row, shape[:-1], self.space)

            def body(i: Any) -> None:
                index = [*lead, i][: len(value.shape)]
                I.buffer_store(buffer, value.at(index), [self.space.simplify(row * shape[-1] + i)])

            self.over(first, chunk, value.vectorises and self.isa.lanes <= chunk, body)

    def operand(self, value: Value, kind: str) -> Any:
        """Return a rows operand for a matrix kernel: "f32", "pairs" (BF16) or "int8" (a triple); made once a value."""
        key = (id(value), kind)
        if key not in self._operands:
            self._keep.append(value)
            make = {"f32": self._f32_operand, "pairs": self._pairs_operand, "int8": self._int8_operand}[kind]
            self._operands[key] = make(value)
        return self._operands[key]

    def _f32_operand(self, value: Value) -> Any:
        plain = self.materialise(value)
        if isinstance(plain.offset, int) and plain.offset == 0:
            return plain.buffer
        return self.materialise(plain, self.scratch(plain.size, "float32")).buffer

    def _pairs_operand(self, value: Value) -> Any:
        k = value.shape[-1]
        rows = value.size // k
        buffer = self.scratch(rows * k // 2, "int32")
        piece = next(p for p in (64, 32, 16, 8, 4, 2) if k % p == 0)
        with self.phase(), self.parallel(rows * (k // piece)) as u:
            row, first = self.space.simplify(u // (k // piece)), self.space.simplify(u % (k // piece) * piece)
            line = local(piece, "float32")
            self._fill_line(value, row, first, piece, line)

            def pair(i: Any) -> None:
                high = tirx.shift_left(bf16_bits(line[i * 2 + 1]), i32(16))
                I.buffer_store(buffer, tirx.bitwise_or(bf16_bits(line[i * 2]), high), [u * (piece // 2) + i])

            self.over(i32(0), piece // 2, True, pair)
        return buffer

    def _int8_operand(self, value: Value) -> Any:
        rows = value.size // value.shape[-1]
        k = -(-value.shape[-1] // GROUP) * GROUP
        out = (
            self.scratch(rows * k // 4, "int32"),
            self.scratch(rows * k // GROUP, "float32"),
            self.scratch(rows * k // GROUP, "int32"),
        )

        def fill(row: Any, first: Any, line: Any) -> None:
            if k == value.shape[-1]:
                self._fill_line(value, row, first, GROUP, line)
                return
            lead = unravel(row, value.shape[:-1], self.space)
            with self.serial(GROUP) as i, I.If(first + i < value.shape[-1]):
                with I.Then():
                    I.buffer_store(line, value.at([*lead, first + i]), [i])
                with I.Else():
                    I.buffer_store(line, tirx.const(0.0, "float32"), [i])

        quantise(self.isa, rows, k, fill, out, self.phase, self.space)
        return out

    def _fill_line(self, value: Value, row: Any, first: Any, size: int, line: Any) -> None:
        """Compute `size` neighbouring elements of a row (all leading dimensions flattened) into a local buffer."""
        lead = unravel(row, value.shape[:-1], self.space)
        # A form that changes inside the line cannot be told apart by ranges; go one by one there.
        smooth = all(b % size == 0 for b in value.breaks) and value.vectorises
        self.over(
            i32(0),
            size,
            smooth,
            lambda i: I.buffer_store(line, value.at([*lead, self.space.simplify(first + i)]), [i]),
        )


def _pieces(size: int, breaks: frozenset[int]) -> list[tuple[int, int]]:
    marks = sorted({0, size, *(b for b in breaks if 0 < b < size)})
    return list(pairwise(marks))


def _identifier(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)
