"""Kernel: the frame of one function; its arguments, its one parallel launch and the phases in it.

Tasks of a phase lie in queues. Each thread empties its share of those, and then helps with what others have left: cores
are seldom as fast as each other, be it that they differ or that something else runs on one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any

from tvm import s_tir
from tvm.script.ir_builder import IRBuilder

from specqd.codegen.isa.base import ISA
from specqd.codegen.tir import I, bind, i32, local, store, tirx
from specqd.errors import CodegenError

__all__ = ["Kernel"]

#: elements from which a buffer cannot be indexed in 32 bits
_INT32 = 2**31
#: queues of a phase, a power of two, and so the threads that can work on one, at most; phases of a kernel, at most
_QUEUES, _PHASES = 256, 2
#: words of a phase: whether all tasks are taken, then how many of each queue are
_WORDS = 1 + _QUEUES
#: gives the number of the next task of a queue, or `count` if there is none; TIR has no atomic operations
_TAKE = """
define i32 @specqd_take(ptr %queue, i32 %count) alwaysinline {
  %seen = load atomic i32, ptr %queue monotonic, align 4
  %left = icmp slt i32 %seen, %count
  br i1 %left, label %take, label %none
take:
  %task = atomicrmw add ptr %queue, i32 1 monotonic, align 4
  ret i32 %task
none:
  ret i32 %count
}
"""


class Kernel:
    """A function being written: declare arguments, then `launch`, then take it as `function`."""

    def __init__(self, isa: ISA) -> None:
        """Open the function."""
        self._arguments: list[Any] = []
        self._builder = IRBuilder()
        self._frames = ExitStack()
        self._frames.enter_context(self._builder)
        self._frames.enter_context(I.attr(0, "specqd.kernel", 1))
        self._frames.enter_context(I.attr(0, "pragma_import_llvm", isa.prelude + _TAKE))
        self._phases = 0

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
        """Return memory of this call; inside a phase, of one thread."""
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
        self._taken = self.scratch(_PHASES * _WORDS, "int32")
        with I.serial(0, _PHASES * _WORDS) as word:
            store(self._taken, word, i32(0), 1)
        with I.attr(0, "pragma_parallel_launch_point", 1):
            yield

    @contextmanager
    def phase(self, tasks: int) -> Iterator[Any]:
        """Open a loop over tasks, each run by exactly one thread, and a barrier after it; gives the task's number."""
        all_taken, self._phases = self._phases * _WORDS, self._phases + 1
        assert self._phases <= _PHASES, "there is memory for fewer phases"
        # Two at least: TVM would have every thread run a parallel loop of one, and finds no loop to share.
        queues = min(_QUEUES, 1 << max(1, (tasks - 1).bit_length()))

        def take(queue: Any, count: Any) -> Any:
            place = tirx.address_of(self._taken[all_taken + 1 + queue])
            return tirx.call_extern("int32", "specqd_take", place, count)

        # The first iteration of a thread takes all that there is to take, its own share first; the others end at once.
        # What a task needs of memory has to be in this loop: outside, it would be moved out of the launch, and shared.
        barrier = I.attr(0, "pragma_parallel_barrier_when_finish", 1)
        with barrier, I.parallel(0, queues) as own, I.If(self._taken[all_taken] == 0), I.Then():
            task = local(1, "int32")
            with I.serial(0, queues) as turn:
                queue = bind(tirx.bitwise_and(own + turn, i32(queues - 1)))
                begin = bind(queue * tasks // queues)
                count = bind((queue + 1) * tasks // queues - begin)
                store(task, 0, take(queue, count), 1)
                with I.While(task[0] < count):
                    yield bind(begin + task[0])
                    store(task, 0, take(queue, count), 1)
            store(self._taken, all_taken, i32(1), 1)

    def function(self, symbol: str) -> Any:
        """Close the function and return it."""
        self._frames.close()
        # Relax looks for a root block in every function that it calls.
        root = s_tir.SBlock([], [], [], "root", self._builder.get())
        function = tirx.PrimFunc(self._arguments, s_tir.SBlockRealize([], True, root))
        return function.with_attr({"global_symbol": symbol, "tirx.noalias": True})
