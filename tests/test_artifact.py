"""Artifacts: written whole or not at all, checked when opened, and staged directories that survive kills."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from toy import facts

from specqd import artifact
from specqd.artifact import Arg, Compiled, Function, is_artifact, open_artifact, save
from specqd.errors import ArtifactError, InputError
from specqd.staging import staged_directory

WEIGHT = Arg(name="w", kind="weight", dtype="uint8", shape=(3 << 20,))
FUNCTION = Function(entry="target", rows=1, last_only=False, symbol="target_1", args=(WEIGHT, WEIGHT))


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SPECQD_CACHE", str(folder))
    return folder


def small(fill: int = 0) -> Compiled:
    weights = {"w": np.full(3 << 20, fill, np.uint8)}
    return Compiled(b"code", weights, (FUNCTION,), "avx2", ("avx2",), "x86_64-unknown-linux-gnu")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    save(tmp_path / "a", small(), facts(), tokenizer_files=[tokenizer], graphs={"target": "graph\n"})
    return tmp_path / "a"


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_what_is_saved_is_opened(target: Path):
    manifest = open_artifact(target).manifest
    assert names(target) == {*manifest.files, "specqd.json"}
    assert set(manifest.files) == {"lib.so", "weights.safetensors", "tokenizer.json", "graphs/target.txt"}
    assert manifest.functions == (FUNCTION,)
    assert (manifest.isa, manifest.cpu_features, manifest.capacity) == ("avx2", ("avx2",), 64)
    assert manifest.sizes("weight") == {"w": 3 << 20}
    assert manifest.memory == 3 << 20


@pytest.mark.parametrize(
    "name", ["specqd.json", "lib.so", "weights.safetensors", "tokenizer.json", "graphs/target.txt"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "grow"])
def test_every_damage_to_every_file_is_noticed(target: Path, name: str, damage: str):
    path = target / name
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    if damage == "flip":
        content[middle] ^= 1
    path.write_bytes({"flip": content, "cut": content[:middle], "grow": content + b"x"}.get(damage, b""))
    if damage == "remove":
        path.unlink()
    with pytest.raises(ArtifactError, match=r"changed|damaged|cut off|instead of|missing|no artifact"):
        open_artifact(target)


def change_manifest(target: Path, **fields: object) -> None:
    path = target / "specqd.json"
    stored = {**json.loads(path.read_text()), **fields}
    stored["digest"] = artifact._digest(stored)
    path.write_text(json.dumps(stored))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schema_version": 99}, r"has format 99, this specqd reads 4: build it again"),
        ({"capacity": "many"}, "is not valid at capacity"),
        ({"surprise": 1}, "is not valid at surprise"),
        ({"files": {"../x": {"size": 1, "sha256": ""}}}, r"names '../x', outside the artifact"),
        ({"files": {"/etc/passwd": {"size": 1, "sha256": ""}}}, "outside the artifact"),
    ],
)
def test_manifests_that_make_no_sense(target: Path, fields: dict, message: str):
    change_manifest(target, **fields)
    with pytest.raises(ArtifactError, match=message):
        open_artifact(target)


def test_a_directory_that_is_none(tmp_path: Path):
    with pytest.raises(ArtifactError, match="is no artifact"):
        open_artifact(tmp_path)
    with pytest.raises(ArtifactError, match="is no artifact"):
        open_artifact(tmp_path / "missing")


def test_large_files_are_hashed_once_and_again_when_touched(target: Path, cache: Path, monkeypatch):
    monkeypatch.setattr("specqd.verified._SETTLED_NS", -1)
    hashed: list[str] = []
    original = artifact._sha256
    monkeypatch.setattr(artifact, "_sha256", lambda path: hashed.append(path.name) or original(path))

    def opened(**how: bool) -> bool:
        hashed.clear()
        open_artifact(target, **how)
        return "weights.safetensors" in hashed

    assert [opened(), opened(), opened(verify=True), opened()] == [True, False, True, False]
    weights = target / "weights.safetensors"
    times = weights.stat()
    with weights.open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"!")
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ArtifactError, match="changed or damaged"):
        open_artifact(target)


def test_a_cache_that_cannot_be_written_only_costs_time(target: Path, monkeypatch):
    monkeypatch.setattr("specqd.verified._SETTLED_NS", -1)
    monkeypatch.setenv("SPECQD_CACHE", "/proc/nowhere")
    assert open_artifact(target).manifest == open_artifact(target).manifest


def test_an_existing_artifact_is_replaced_only_when_told(target: Path):
    with pytest.raises(InputError, match="exists and is not empty"):
        save(target, small(1), facts())
    before = open_artifact(target).manifest
    save(target, small(1), facts(), force=True)
    assert open_artifact(target).manifest != before
    assert [path.name for path in target.parent.iterdir() if path.name.startswith(".")] == []


def test_a_directory_of_something_else_is_never_replaced(tmp_path: Path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    for name in ("home", "file"):
        with pytest.raises(InputError, match="exists and is not"):
            save(tmp_path / name, small(), facts(), force=True)
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty", small(), facts())
    assert is_artifact(tmp_path / "empty")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("force", [False, True])
def test_a_full_disk_leaves_what_was_there(target: Path, monkeypatch, number: int, force: bool):
    before = open_artifact(target).manifest
    destination = target if force else target.with_name("new")

    def full(path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(number, "No space left on device", str(path))

    monkeypatch.setattr(artifact, "write_weights", full)
    with pytest.raises(ArtifactError, match=r"disk that holds .* is full: .* about 3 MB; nothing was kept"):
        save(destination, small(), facts(), force=force)
    assert open_artifact(target).manifest == before
    assert {path.name for path in target.parent.iterdir()} == {"a", "tokenizer.json"}


def test_other_faults_of_the_disk_are_not_hidden(tmp_path: Path, monkeypatch):
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(artifact, "write_weights", broken)
    with pytest.raises(OSError, match="Input/output error"):
        save(tmp_path / "a", small(), facts())
    assert list(tmp_path.iterdir()) == []


STAGE = """
import sys, time
from pathlib import Path
from specqd.staging import staged_directory
with staged_directory(Path(sys.argv[1]), replaceable=lambda _: True) as part:
    (part / "half").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_what_a_kill_leaves_is_cleaned_by_the_next_and_not_while_its_maker_lives(tmp_path: Path):
    target = tmp_path / "a"
    maker = subprocess.Popen([sys.executable, "-c", STAGE, str(target)], stdout=subprocess.PIPE)
    assert maker.stdout is not None
    assert maker.stdout.readline() == b"ready\n"
    with staged_directory(target) as part:
        assert len(list(tmp_path.iterdir())) == 2
        (part / "whole").write_text("")
    assert sorted(path.name.startswith(".a.specqd-part-") for path in tmp_path.iterdir()) == [False, True]
    maker.send_signal(signal.SIGKILL)
    maker.wait()
    maker.stdout.close()
    with staged_directory(tmp_path / "b"):
        pass
    assert len(list(tmp_path.iterdir())) == 3
    with staged_directory(target, replaceable=lambda _: True) as part:
        (part / "new").write_text("")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
    assert names(target) == {"new"}


def test_readers_never_see_half_a_directory_while_it_is_replaced(tmp_path: Path):
    target = tmp_path / "a"

    def write(number: int) -> None:
        with staged_directory(target, replaceable=lambda _: True) as part:
            for name in ("x", "y"):
                (part / name).write_text(str(number))

    write(0)
    writer = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys\nfrom pathlib import Path\nfrom specqd.staging import staged_directory\n"
            "for i in range(30):\n"
            "    with staged_directory(Path(sys.argv[1]), replaceable=lambda _: True) as part:\n"
            "        (part / 'x').write_text(str(i)); (part / 'y').write_text(str(i))\n",
            str(target),
        ]
    )
    absent = 0
    while writer.poll() is None:
        absent += not target.is_dir()
        time.sleep(0)
    assert writer.returncode == 0
    assert absent == 0
    assert (target / "x").read_text() == (target / "y").read_text() == "29"


def test_where_directories_cannot_be_swapped_at_once(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("specqd.staging.ctypes.CDLL", lambda *_, **__: object())
    for text in ("old", "new"):
        with staged_directory(tmp_path / "a", replaceable=lambda _: True) as part:
            (part / "x").write_text(text)
    assert (tmp_path / "a" / "x").read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"a"}
