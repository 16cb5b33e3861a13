"""The compiled artifact: a directory of manifest, native code, packed weights, tokenizer and graph dumps.

`lib.so` is native code that runs with the rights of whoever loads it, and no check here can make it
harmless: load only artifacts you trust. Nothing in an artifact is ever unpickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from specqd.errors import ArtifactError, InputError
from specqd.manifest import SCHEMA_VERSION, Arg, Compiled, FileRecord, Function, Manifest, Refused
from specqd.staging import staged_directory
from specqd.verified import remember, stamp
from specqd.weightfile import write_weights

__all__ = [
    "Arg",
    "Artifact",
    "Compiled",
    "FileRecord",
    "Function",
    "Manifest",
    "Refused",
    "demand_writable",
    "is_artifact",
    "open_artifact",
    "save",
    "specqd_version",
    "store_plan",
]

MANIFEST = "specqd.json"
LIBRARY = "lib.so"
WEIGHTS = "weights.safetensors"

_BUILD_AGAIN = "build it again with `specqd compile`"


@dataclass(frozen=True)
class Artifact:
    """An opened artifact whose files have been checked."""

    directory: Path
    manifest: Manifest

    @property
    def library(self) -> Path:
        """The native code."""
        return self.directory / LIBRARY

    @property
    def weights(self) -> Path:
        """The packed weights."""
        return self.directory / WEIGHTS


def save(
    target: Path,
    compiled: Compiled,
    facts: Mapping[str, Any],
    *,
    tokenizer_files: Iterable[Path] = (),
    graphs: Mapping[str, str] | None = None,
    force: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Manifest:
    """Write an artifact whole or not at all; `force` replaces an existing one once the new one is complete.

    `facts` are the fields of Manifest that `compiled` does not know; `progress` is told bytes written.

    Raises:
        InputError: `target` exists, and is no artifact or `force` is not given.
        ArtifactError: the disk is full.
    """
    try:
        with staged_directory(target, replaceable=is_artifact if force else None) as folder:
            if isinstance(compiled.library, bytes):
                (folder / LIBRARY).write_bytes(compiled.library)
            else:
                shutil.copyfile(compiled.library, folder / LIBRARY)
            write_weights(folder / WEIGHTS, compiled.weights, progress)
            for path in tokenizer_files:
                shutil.copyfile(path, folder / path.name)
            (folder / "graphs").mkdir()
            for entry, text in (graphs or {}).items():
                (folder / "graphs" / f"{entry}.txt").write_text(text, "utf-8")
            manifest = _manifest(folder, compiled, facts)
            (folder / MANIFEST).write_text(_text(manifest), "utf-8")
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        code = compiled.library
        size = len(code) if isinstance(code, bytes) else code.stat().st_size
        need = (size + sum(array.nbytes for array in compiled.weights.values())) / 1e6
        raise ArtifactError(
            f"the disk that holds {target} is full: the artifact needs about {need:.0f} MB; nothing was kept"
        ) from error
    return manifest


def demand_writable(directory: Path) -> None:
    """Check that `store_plan` can write, before work is spent on a plan; raises InputError."""
    _read_manifest(directory)
    if not os.access(directory, os.W_OK | os.X_OK):
        raise InputError(
            f"{directory} cannot be written to, so that it can keep no plan: copy it where you may write"
        )


def store_plan(directory: Path, plan: str, speedup: float) -> None:
    """Replace the plan of an artifact in one step, and what it is predicted to gain; nothing else changes.

    Raises:
        ArtifactError: the manifest is missing or damaged.
    """
    manifest = _read_manifest(directory).model_copy(update={"plan": plan, "planned_speedup": speedup})
    handle, name = tempfile.mkstemp(dir=directory, prefix=f".{MANIFEST}-")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(_text(manifest))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, (directory / MANIFEST).stat().st_mode)
        os.replace(name, directory / MANIFEST)
    except BaseException:
        os.unlink(name)
        raise


def is_artifact(directory: Path) -> bool:
    """Whether the directory was written by `save`, whatever state it is in."""
    return (directory / MANIFEST).is_file()


def open_artifact(directory: Path, *, verify: bool = False) -> Artifact:
    """Read the manifest and check every file against it.

    A file is hashed when it is small, when `verify` is set, or when it is not the very file (device, inode,
    size and times) that this user's specqd hashed before: opening an artifact again costs next to nothing.

    Raises:
        ArtifactError: a file is missing, cut off or changed, or the artifact was written by another release.
    """
    manifest = _read_manifest(directory)
    for name, record in manifest.files.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ArtifactError(f"{directory / MANIFEST} names {name!r}, outside the artifact: do not use it")
        _check(directory / name, record, verify)
    return Artifact(directory, manifest)


def _manifest(folder: Path, compiled: Compiled, facts: Mapping[str, Any]) -> Manifest:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return Manifest(
        specqd_version=specqd_version(),
        isa=compiled.isa,
        triple=compiled.triple,
        cpu_features=compiled.cpu_features,
        functions=compiled.functions,
        module=compiled.module,
        files={
            path.relative_to(folder).as_posix(): FileRecord(size=path.stat().st_size, sha256=_sha256(path))
            for path in paths
        },
        **{**facts, "refusals": (*facts.get("refusals", ()), *compiled.refusals)},
    )


def specqd_version() -> str:
    """The release that is installed; `unknown` where it is not."""
    try:
        return version("specqd")
    except PackageNotFoundError:
        return "unknown"


def _text(manifest: Manifest) -> str:
    digest = _digest(manifest.model_dump(mode="json"))
    return json.dumps(manifest.model_copy(update={"digest": digest}).model_dump(mode="json"), indent=1) + "\n"


def _digest(fields: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in fields.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{directory} is no artifact: {_lack(directory)}; `specqd compile` makes one")
    try:
        fields = json.loads(path.read_text("utf-8"))
        found = fields["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is cut off or damaged: {_BUILD_AGAIN}") from error
    if found != SCHEMA_VERSION:
        raise ArtifactError(f"{path} has format {found}, this specqd reads {SCHEMA_VERSION}: {_BUILD_AGAIN}")
    if fields.get("digest") != _digest(fields):
        raise ArtifactError(f"{path} was changed after it was built: {_BUILD_AGAIN}")
    try:
        return Manifest.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ArtifactError(f"{path} is not valid at {where} ({first['msg']}): {_BUILD_AGAIN}") from error


def _lack(directory: Path) -> str:
    if not directory.exists():
        return "there is no such folder"
    return f"it has no {MANIFEST}" if directory.is_dir() else "it is not a folder"


def _check(path: Path, record: FileRecord, verify: bool) -> None:
    if not path.is_file():
        raise ArtifactError(f"{path} is missing from the artifact: {_BUILD_AGAIN}")
    size = path.stat().st_size
    if size != record.size:
        raise ArtifactError(
            f"{path} has {size} bytes instead of {record.size}: copy the artifact again, or {_BUILD_AGAIN}"
        )
    known = stamp(path, record.sha256)
    if known and known.exists() and not verify:
        return
    if _sha256(path) != record.sha256:
        raise ArtifactError(f"{path} was changed or damaged after it was built: {_BUILD_AGAIN}")
    if known:
        remember(known)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
