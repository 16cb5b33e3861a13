"""A loaded artifact of a module that is no language model: a function of arrays."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from specqd.artifact import Artifact, open_artifact
from specqd.errors import ArtifactError, InputError
from specqd.manifest import ModuleRecord, TensorRecord
from specqd.runtime.cpu import demand_cpu
from specqd.runtime.library import aligned, load_functions, tensor
from specqd.runtime.threads import available_cpus
from specqd.runtime.tiles import permit_tiles
from specqd.weightfile import ALIGNMENT, read_weights

__all__ = ["Module"]

_CPU, _POOLED = (
    1,
    2,
)  # DLPack's name of the device, TVM's of the allocator that keeps memory for the next call


class Module:
    """A function of arrays, in the memory of the process that loaded it.

    It takes numpy arrays, torch tensors and whatever else speaks DLPack, and gives numpy arrays, or torch tensors
    if a torch tensor was given: one, or a tuple of several. Several threads may call it; they wait for each other.
    What it declares as states it keeps from call to call: load it once for each stream.
    """

    def __init__(self, artifact: Artifact, threads: int | None = None) -> None:
        """Load code and weights; raises ArtifactError if they do not belong together, or to this CPU."""
        manifest = artifact.manifest
        if manifest.module is None:
            raise ArtifactError(f"{artifact.directory} is of a language model: load it with `specqd.load`")
        demand_cpu(manifest.triple, manifest.cpu_features)
        if "amx_tile" in manifest.cpu_features:
            permit_tiles()
        self.directory = artifact.directory
        self.record: ModuleRecord = manifest.module
        if threads is not None and threads < 1:
            raise InputError(f"cannot run on {threads} threads: ask for 1 or more")
        find = load_functions(artifact.library, threads or available_cpus())
        machine: Any = find("vm_load_executable")()
        machine["vm_initialization"](_CPU, 0, _POOLED)
        self._machine = machine
        self._main: Callable[..., Any] = machine["main"]
        self._weights = tuple(map(tensor, _parameters(artifact, self.record)))
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Forget what earlier calls left: states are zeros again."""
        with self._lock:
            self._states = [_zeros(state) for state in self.record.states]

    @classmethod
    def open(cls, directory: str | Path, threads: int | None = None, *, verify: bool = False) -> Module:
        """Load an artifact directory; see specqd.load."""
        return cls(open_artifact(Path(directory), verify=verify), threads)

    def __call__(self, *inputs: Any) -> Any:
        """Compute the outputs.

        Raises:
            InputError: an input is not what the module takes, or holds an index that is out of range.
        """
        if len(inputs) != len(self.record.inputs):
            takes = ", ".join(map(str, self.record.inputs))
            raise InputError(
                f"the module was given {len(inputs)} inputs and takes {len(self.record.inputs)}: {takes}"
            )
        given = [_taken(value, wanted) for value, wanted in zip(inputs, self.record.inputs, strict=True)]
        _demand_sizes(self.record, [tuple(value.shape) for value in given])
        with self._lock:
            try:
                found = list(self._main(*given, *self._states, *self._weights))
            except IndexError as error:
                raise InputError("an input holds an index that is out of range of what it indexes") from error
            except ValueError as error:
                raise InputError(f"an input leads to what cannot be computed: {error}") from error
            self._states = [found.pop() for _ in self._states][::-1]
        torch = sys.modules.get("torch")
        as_torch = torch is not None and any(isinstance(value, torch.Tensor) for value in inputs)
        convert = torch.from_dlpack if torch is not None and as_torch else np.from_dlpack
        outputs = tuple(convert(value) for value in found)
        return outputs[0] if len(outputs) == 1 else outputs

    def instrument(self, note: Callable[[str, bool, tuple[Any, ...]], None]) -> None:
        """Let every call from now on tell of the functions it calls, kernels and parts of the virtual machine.

        `note(name, begins, arguments)` is called before and after each; the arguments that are tensors have a shape
        and a dtype.
        """

        def told(_: Any, name: str, begins: bool, __: Any, *arguments: Any) -> int:
            note(name, begins, arguments)
            return 0

        self._machine["set_instrument"](told)

    def __repr__(self) -> str:
        """Say what it takes, gives and keeps."""
        listed = (self.record.inputs, self.record.outputs, self.record.states)
        takes, gives, keeps = (", ".join(map(str, tensors)) for tensors in listed)
        return f"Module({takes} -> {gives}{f', keeping {keeps}' if keeps else ''})"


def _zeros(state: TensorRecord) -> Any:
    shape = [size for size in state.shape if isinstance(size, int)]
    return _from_numpy(np.zeros(shape, state.dtype))


def _parameters(artifact: Artifact, record: ModuleRecord) -> list[np.ndarray]:
    arrays = read_weights(artifact.weights)
    missing = next((name for name in record.parameters if name not in arrays), None)
    if missing is not None:
        raise ArtifactError(f"the weight file does not hold {missing!r} as compiled: compile it again")
    return [arrays[name] for name in record.parameters]


def _taken(value: Any, wanted: TensorRecord) -> Any:
    """Return an input as compiled code takes it: contiguous, aligned, of the wanted dtype and rank."""
    if isinstance(value, np.ndarray):
        array = value
    elif hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__"):
        if value.__dlpack_device__()[0] != _CPU:
            raise InputError(f"the module takes {wanted} on the CPU; move it there")
        return _from_dlpack(value, wanted)
    else:
        raise InputError(f"the module takes {wanted}; give an array, not {type(value).__name__}")
    _demand(array.dtype.name if array.dtype.isnative else f"{array.dtype}", array.shape, wanted)
    return _from_numpy(array)


def _from_numpy(array: np.ndarray) -> Any:
    if (
        array.size
        and array.flags.c_contiguous
        and array.flags.writeable
        and array.ctypes.data % ALIGNMENT == 0
    ):
        return tensor(array)
    # Of an array without elements numpy and torch leave the strides open, and compiled code checks them.
    strides = [array.itemsize * math.prod(array.shape[d + 1 :]) for d in range(array.ndim)]
    memory = aligned(max(array.nbytes, array.itemsize))
    copy = np.ndarray(array.shape, array.dtype, memory, strides=strides)
    copy[...] = array
    return tensor(copy)


def _from_dlpack(value: Any, wanted: TensorRecord) -> Any:
    from specqd.runtime.library import from_dlpack

    detached = value.detach() if hasattr(value, "detach") else value
    dense = detached.contiguous() if hasattr(detached, "contiguous") else detached
    found = from_dlpack(dense)
    _demand(str(found.dtype), tuple(found.shape), wanted)
    try:
        # An empty tensor may have strides that compiled code takes for gaps.
        return tensor(dense) if 0 not in found.shape else _from_numpy(np.from_dlpack(dense))
    except (RuntimeError, ValueError, BufferError):
        return _from_numpy(np.from_dlpack(dense))


def _demand(dtype: str, shape: Sequence[int], wanted: TensorRecord) -> None:
    fits = len(shape) == len(wanted.shape) and all(
        got == size for got, size in zip(shape, wanted.shape, strict=True) if isinstance(size, int)
    )
    if not fits or dtype != wanted.dtype:
        raise InputError(f"the module takes {wanted}, not {dtype} {list(shape)}")


def _demand_sizes(module: ModuleRecord, shapes: Sequence[tuple[int, ...]]) -> None:
    """Check that dynamic sizes of one name are the same everywhere, and in their range."""
    known: dict[str, tuple[int, TensorRecord]] = {}
    for record, shape in zip(module.inputs, shapes, strict=True):
        for size, got in zip(record.shape, shape, strict=True):
            if isinstance(size, str):
                first, where = known.setdefault(size, (got, record))
                if first != got:
                    raise InputError(
                        f"{record} has {got} where {where} has {first}: sizes of one name must be the same"
                    )
                least, most = module.ranges.get(size, (0, None))
                if got < least or (most is not None and got > most):
                    raise InputError(
                        f"{record} was compiled for {size} from {least} to {most}, and not for {got}"
                    )
