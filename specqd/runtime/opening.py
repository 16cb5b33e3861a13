"""`specqd.load(directory)`: whatever an artifact holds, ready to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specqd.artifact import open_artifact
from specqd.errors import InputError
from specqd.runtime.model import load as load_model
from specqd.runtime.module import Module

__all__ = ["load"]


def load(directory: str | Path, threads: int | None = None, *, verify: bool = False, **options: Any) -> Any:
    """Load an artifact, which runs its code in this process: load only what you trust.

    1. Of a language model, a specqd.runtime.model.Model; see there for `options`.
    2. Of any other module, a specqd.runtime.module.Module, which is called with the module's inputs.

    `threads` is the most it may use (default: the CPUs of this process); `verify` hashes every file again.

    Raises:
        ArtifactError: the artifact is missing, damaged, or made for another CPU.
        InputError: an option is out of range, or is none of the artifact's kind.
    """
    artifact = open_artifact(Path(directory), verify=verify)
    if artifact.manifest.module is None:
        return load_model(directory, threads, verify=False, **options)
    if options:
        raise InputError(
            f"{directory} is no language model, which alone has an option {next(iter(options))!r}"
        )
    return Module(artifact, threads)
