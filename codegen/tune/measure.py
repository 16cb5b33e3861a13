"""Times of kernels: built side by side, run by TVM's meta_schedule on this machine, or on those of an RPC tracker."""

from __future__ import annotations

import itertools
import math
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import tvm
from tvm.s_tir.meta_schedule.arg_info import TensorInfo
from tvm.s_tir.meta_schedule.runner import EvaluatorConfig, LocalRunner, RPCConfig, RPCRunner, RunnerInput
from tvm.support.popen_pool import PopenPoolExecutor, StatusKind

from specqd.codegen.dense_kernels import ConvSpec, GemmSpec, Schedule, conv2d, gemm
from specqd.codegen.isa import ISA
from specqd.codegen.library import machine_code
from specqd.errors import InputError
from specqd.runtime.threads import available_cpus

__all__ = ["Measuring"]

#: five measurements of at least 20 ms
_EVALUATION = EvaluatorConfig(number=1, repeat=5, min_repeat_ms=20)
_BUILD, _RUN = 60.0, 20.0  # seconds that one kernel may take
_KEY = "specqd"


class Measuring:
    """Builds kernels and runs them one after another; use it as a context."""

    def __init__(self, isa: ISA, tracker: str | None = None) -> None:
        """Say what for, and where.

        `tracker`: HOST:PORT or HOST:PORT/KEY of a TVM RPC tracker whose servers, of the same CPU, run the kernels.

        Raises:
            InputError: the address is none, or nobody answers there.
        """
        self._isa, self._tracker = isa, None if tracker is None else _tracker(tracker)
        # Of libraries: a file that a process has open must not be written again.
        self._count = itertools.count()

    def __enter__(self) -> Measuring:
        self._folder = tempfile.TemporaryDirectory(prefix="specqd-tune-")
        self._builders = PopenPoolExecutor(max_workers=available_cpus(), timeout=_BUILD)
        self._runner: Any = (
            LocalRunner(_RUN, _EVALUATION, f_alloc_argument=_allocated)
            if self._tracker is None
            else RPCRunner(self._tracker, _EVALUATION, f_alloc_argument=_allocated_there)
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._builders.shutdown()
        self._runner.pool.shutdown()
        self._folder.cleanup()

    def __call__(self, spec: ConvSpec | GemmSpec, schedules: Sequence[Schedule]) -> np.ndarray:
        """Return the seconds of each schedule there and back, `[2, schedules]`; infinity where it fails."""
        places = [str(Path(self._folder.name) / f"{next(self._count)}.so") for _ in schedules]
        jobs = [(spec, self._isa, *of) for of in zip(schedules, places, strict=True)]
        built = {
            i: RunnerInput(places[i], "cpu", [TensorInfo(dtype, shape) for dtype, shape in result.value])
            for i, result in enumerate(self._builders.map_with_error_catching(lambda job: _build(*job), jobs))
            if result.status == StatusKind.COMPLETE
        }
        order = [*built, *reversed(built)]  # what comes first, and what last, may be slower for that
        seconds = np.full((2, len(schedules)), math.inf)
        for at, future in enumerate(self._runner.run([built[i] for i in order])):
            result = future.result()
            if not result.error_msg:
                seconds[at // len(built), order[at]] = median(float(x) for x in result.run_secs)
        return seconds


def _tracker(address: str) -> Any:
    place, _, key = address.partition("/")
    host, _, port = place.rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"the tracker {address!r} is no address: give HOST:PORT, or HOST:PORT/KEY")
    config = RPCConfig(host, int(port), key or _KEY, session_timeout_sec=60)
    try:
        socket.create_connection((host, int(port)), 5).close()  # TVM itself tries for a minute
        config.count_num_servers(allow_missing=False)
    except Exception as error:
        raise InputError(
            f"no machine can be had at {place}: start `python -m tvm.exec.rpc_tracker` there (needs tornado), and on "
            f"machines of this CPU `python -m tvm.exec.rpc_server --tracker={place} --key={config.tracker_key}`"
        ) from error
    return config


def _build(
    spec: ConvSpec | GemmSpec, isa: ISA, schedule: Schedule, place: str
) -> list[tuple[str, list[int]]]:
    """Write the library of a kernel; return the types and shapes of its arguments."""
    write: Any = conv2d if isinstance(spec, ConvSpec) else gemm
    function = write(spec, isa, "main", schedule)
    machine_code(tvm.IRModule({"main": function}), isa).export_library(place)
    return [(str(buffer.dtype), [int(size) for size in buffer.shape]) for buffer in function.params]


def _allocated(device: Any, args: Any, repeat: int) -> list[list[Any]]:
    """Make the arguments: small numbers that are no zeros, BF16 as its bits in uint16."""
    rng = np.random.default_rng(0)

    def filled(dtype: str, shape: Sequence[int]) -> Any:
        if dtype.startswith("float"):
            made = rng.standard_normal(shape).astype(dtype)
        elif dtype == "uint16":
            made = (rng.standard_normal(shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        else:
            made = rng.integers(0, 100, shape).astype(dtype)
        return tvm.runtime.tensor(made, device)

    return [[filled(str(dtype), [int(n) for n in shape]) for _, dtype, shape in args] for _ in range(repeat)]


def _allocated_there(session: Any, device: Any, args: Any, repeat: int) -> list[list[Any]]:
    return _allocated(device, args, repeat)
