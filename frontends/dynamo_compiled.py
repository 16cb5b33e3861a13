"""A graph of AOTAutograd's, compiled: what torch calls, and saves together with the wrappers it puts around it."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor
from torch._inductor.output_code import OutputCode

from specqd.frontends.dynamo_graph import Outputs
from specqd.runtime.module import Module

__all__ = ["CompiledGraph", "load_own"]


class CompiledGraph(OutputCode):
    """Computes the outputs of a graph from a list of its inputs, which it may empty.

    A copy that is to be saved holds the files of the artifact, by their names, instead of what was loaded from them.
    """

    def __init__(self, outputs: Outputs, module: Callable[..., Any] | None) -> None:
        """`module` takes the tensors among the inputs that are no weights; None where the graph computes no tensor."""
        super().__init__()
        self._boxed_call = True  # torch's wrappers copy this from the instance
        self.outputs, self.module = outputs, module
        self.files: dict[str, bytes] = {}

    def __call__(self, inputs: Any) -> list[Any]:
        """Return the outputs."""
        given = list(inputs)
        inputs.clear()
        free = (value for value in given[self.outputs.weights :] if isinstance(value, Tensor))
        return self.outputs.assemble(given, self.module(*free) if self.module else ())

    def prepare_for_serialization(self) -> None:
        """Read the files of the artifact."""
        if isinstance(self.module, Module):
            folder = self.module.directory
            paths = [path for path in folder.rglob("*") if path.is_file()]
            self.files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        self.module = None

    def post_compile(self, example_inputs: Any, constants: Any, graph_kwargs: Any) -> None:
        """Load the artifact from its files."""
        if self.files:
            self.module = load_own(self._write)

    def _write(self, folder: Path) -> None:
        for name, content in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


def load_own(write: Callable[[Path], object]) -> Module:
    """Load the artifact that `write` makes of a folder; the folder goes when the module does."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "graph"
        write(folder)
        module = Module.open(folder)
        weakref.finalize(module, stack.pop_all().close)
    return module
