"""Kernel: the frame of one function; its arguments, its one parallel launch and the phases in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any

from tvm import s_tir
from tvm.script.ir_builder import IRBuilder

from specqd.codegen.isa.base import ISA
from specqd.codegen.tir import I, tirx
from specqd.errors import CodegenError

__all__ = ["Kernel"]

#: elements from which a buffer cannot be indexed in 32 bits
_INT32 = 2**31


class Kernel:
    """A function being written: declare arguments, then `launch`, then take it as `function`."""

    def __init__(self, isa: ISA) -> None:
        """Open the function."""
        self._arguments: list[Any] = []
        self._builder = IRBuilder()
        self._frames = ExitStack()
        self._frames.enter_context(self._builder)
        self._frames.enter_context(I.attr(0, "specqd.kernel", 1))
        if isa.prelude:
            self._frames.enter_context(I.attr(0, "pragma_import_llvm", isa.prelude))

    def argument(self, name: str, shape: tuple[Any, ...], dtype: str, view: str | None = None) -> Any:
        """Declare the next argument and return its memory as a flat buffer of `view`, a type of any width.

        BF16 is passed as its bits, in uint16.
        """
        self._demand_indexable(name, prod(size for size in shape if isinstance(size, int)))
        stored = "uint16" if dtype == "bfloat16" else dtype
        buffer = tirx.decl_buffer(shape, stored, name)
        self._arguments.append(buffer)
        return I.decl_buffer((prod(shape),), view or stored, data=buffer.data)

    def scratch(self, size: int, dtype: str) -> Any:
        """Return memory of this call; inside a parallel loop, of one iteration."""
        self._demand_indexable("memory of a kernel", size)
        return I.alloc_buffer((size,), dtype)

    def _demand_indexable(self, name: str, size: int) -> None:
        if size >= _INT32:
            error = CodegenError(f"{name} has {size} elements; kernels index below {_INT32}")
            # A builder that stays open outlives Python, which then ends with a crash.
            self._frames.__exit__(CodegenError, error, None)
            raise error

    @contextmanager
    def launch(self) -> Iterator[None]:
        """Open the region that every thread runs, once a function: all phases lie in it."""
        with I.attr(0, "pragma_parallel_launch_point", 1):
            yield

    @contextmanager
    def phase(self) -> Iterator[None]:
        """Open a phase: one or more parallel loops, and a barrier after them."""
        with I.attr(0, "pragma_parallel_barrier_when_finish", 1):
            yield

    def function(self, symbol: str) -> Any:
        """Close the function and return it."""
        self._frames.close()
        # Relax looks for a root block in every function that it calls.
        root = s_tir.SBlock([], [], [], "root", self._builder.get())
        function = tirx.PrimFunc(self._arguments, s_tir.SBlockRealize([], True, root))
        return function.with_attr({"global_symbol": symbol, "tirx.noalias": True})
