"""Tasks of a kernel's phases: each runs once, whatever the threads, and a phase begins when the last has ended."""

import numpy as np
import pytest
import tvm

from specqd.codegen.dense_kernels.kernel import Kernel
from specqd.codegen.isa import named
from specqd.codegen.library import machine_code
from specqd.codegen.tir import store
from specqd.runtime.library import aligned, tensor


def counted(tasks):
    """Compile tasks that add one to a place of their own, then read what one of the phase before has left."""
    kernel = Kernel(named("generic"))
    counts, read = (kernel.argument(name, (tasks,), "int32") for name in ("counts", "read"))
    with kernel.launch():
        with kernel.phase(tasks) as task:
            store(counts, task, counts[task] + 1, 1)
        with kernel.phase(tasks) as task:
            store(read, task, read[task] + counts[tasks - 1 - task], 1)
    return machine_code(tvm.IRModule({"f": kernel.function("f")}), named("generic")).jit()["f"]


@pytest.mark.parametrize("tasks", [1, 2, 3, 63, 64, 65, 255, 256, 257, 1000])
def test_each_task_runs_once_and_after_the_phase_before(tasks):
    run = counted(tasks)
    for _ in range(20):
        arrays = [aligned(4 * tasks).view(np.int32) for _ in range(2)]
        for array in arrays:
            array[...] = 0
        run(*map(tensor, arrays))
        assert all((array == 1).all() for array in arrays)


def test_a_kernel_with_more_phases_than_there_is_memory_for_is_not_written():
    kernel = Kernel(named("generic"))
    with kernel.launch():
        for _ in range(2):
            with kernel.phase(2):
                pass
        with pytest.raises(AssertionError, match="fewer phases"), kernel.phase(2):
            pass
    kernel.function("f")
