"""Places that cannot be written, signals, and streams that end: as a user meets them, nothing half-written."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_server import PIPELINE, CommandServer, Ended, one_sentence

from specqd import artifact
from specqd.cli import main
from specqd.errors import CodegenError

pytest_plugins = ["tiny_artifact"]

NOBODY = 65534


def test_targets_that_are_taken(server: CommandServer, built: Path, place: Path):
    (place / "file").write_text("mine")
    (place / "folder").mkdir()
    (place / "folder" / "thesis.txt").write_text("years of work")
    shutil.copytree(built, place / "a")
    for target in ("file", "folder"):
        for force in ([], ["--force"]):
            ended = server.run("compile", "model", "-o", str(place / target), *PIPELINE, *force)
            one_sentence(ended, f"{target} exists and is not")
    one_sentence(server.run("compile", "model", "-o", str(place / "file" / "a")), "file is not a directory")
    one_sentence(server.run("compile", "model", "-o", str(place / ("n" * 250))), "longer than 229 bytes")
    one_sentence(
        server.run("compile", "model", "-o", str(place / "a"), *PIPELINE), "a exists and is not empty"
    )
    assert (place / "folder" / "thesis.txt").read_text() == "years of work"
    assert (place / "file").read_text() == "mine"
    assert server.run("compile", "model", "-o", str(place / "a"), *PIPELINE, "--force").code == 0
    assert {path.name for path in place.iterdir()} == {"file", "folder", "a"}


def test_a_target_in_a_missing_folder(server: CommandServer, place: Path):
    target = place / "new" / "newer" / "a"
    assert server.run("compile", "model", "-o", str(target), *PIPELINE).code == 0
    assert artifact.is_artifact(target)


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"needs the right to mount a file system: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(server: CommandServer, built: Path, place: Path):
    with mounted(place, "size=200k") as disk:
        ended = server.run("compile", "model", "-o", str(disk / "new" / "a"), *PIPELINE)
        one_sentence(ended, f"the disk that holds {disk}/new/a is full", "nothing was kept")
        assert list(disk.iterdir()) == []
        ended = server.run("compile", "model", "-o", str(disk), *PIPELINE)
        one_sentence(ended, "is a mount point, which cannot be replaced: give a folder inside it")


def test_a_disk_that_can_only_be_read(server: CommandServer, built: Path, place: Path):
    with mounted(place, "ro") as disk:
        for verb in (["compile", "model"], ["fetch", "smollm2"]):
            one_sentence(server.run(*verb, "-o", str(disk / "a")), f"{disk} cannot be written to")
        ended = server.run("generate", str(built), "-p", "a", "-n", "2", env={"SPECQD_CACHE": str(disk)})
        assert (ended.code, ended.err) == (0, "")


def test_a_folder_of_somebody_else(server: CommandServer):
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o555)
        user = {"user": NOBODY} if os.geteuid() == 0 else {}
        one_sentence(
            server.run("compile", "model", "-o", f"{name}/a", **user), f"{name} cannot be written to"
        )


def test_tuning_an_artifact_of_somebody_else(server: CommandServer, built: Path):
    with tempfile.TemporaryDirectory() as name:
        shutil.copytree(built, f"{name}/a")
        for folder in (name, f"{name}/a"):
            Path(folder).chmod(0o555)
        user = {"user": NOBODY} if os.geteuid() == 0 else {}
        one_sentence(server.run("tune", f"{name}/a", **user), f"{name}/a cannot be written to")
        Path(f"{name}/a").chmod(0o755)


def test_a_cache_that_cannot_be_written_only_costs_time(server: CommandServer, place: Path):
    (place / "file").write_text("")
    nowhere = {"SPECQD_CACHE": str(place / "file" / "cache")}
    assert server.run("compile", "model", "-o", str(place / "a"), *PIPELINE, env=nowhere).code == 0


def half_written(place: Path) -> list[Path]:
    return list(place.glob(".a.specqd-part-*/weights.safetensors"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_while_an_artifact_is_written(
    server: CommandServer, built: Path, place: Path, number: signal.Signals
):
    pid = server.start("compile", "model", "-o", str(place / "a"), *PIPELINE, pause=True)
    deadline = time.monotonic() + 30
    while not half_written(place):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(pid, number)
    ended = server.wait(pid)
    assert (ended.code, ended.out, ended.err) == (
        -number if number == signal.SIGKILL else 128 + number,
        "",
        "",
    )
    assert len(half_written(place)) == (number == signal.SIGKILL)
    assert not (place / "a").exists()
    assert server.run("compile", "model", "-o", str(place / "a"), *PIPELINE).code == 0
    assert [path.name for path in place.iterdir()] == ["a"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_a_library_turns_into_an_error_of_its_own(capsys, monkeypatch, number: signal.Signals):
    def compile_model(*_: object, **__: object) -> None:
        try:
            os.kill(os.getpid(), number)
        except BaseException as error:
            raise CodegenError("TVM could not compile the program") from error

    monkeypatch.setattr("specqd.build.compile_model", compile_model)
    with pytest.raises(SystemExit) as end:
        main(["compile", "model", "-o", "a"])
    assert end.value.code == 128 + number
    assert capsys.readouterr() == ("", "")


def test_two_compiles_to_one_target(server: CommandServer, built: Path, place: Path):
    command = ("compile", "model", "-o", str(place / "a"), *PIPELINE)
    both = [server.wait(pid) for pid in [server.start(*command), server.start(*command)]]
    assert sorted(ended.code for ended in both) in ([0, 0], [0, 2])
    for ended in both:
        if ended.code:
            one_sentence(ended, "a exists and is not empty")
    assert [path.name for path in place.iterdir()] == ["a"]
    assert server.run("inspect", str(place / "a"), "--verify").code == 0


SPECQD = f"{sys.executable} -m specqd.cli"


@pytest.mark.parametrize("verb", ["--help", "passes", "inspect {built}", "generate {built} -p ab"])
def test_output_that_nobody_reads_or_that_has_no_room(built: Path, verb: str):
    command = f"{SPECQD} {verb.format(built=built)}"
    script = f"{command} | true; echo ${{PIPESTATUS[0]}}; {command} > /dev/full; echo $?"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    first, second = done.stdout.split()
    assert first in {"0", "1"}  # 0: all was written before the reader left
    assert second == "2"
    one_sentence(Ended(2, "", done.stderr), "no space left on the disk of the output")


def test_closed_standard_streams(built: Path):
    script = f"{SPECQD} generate {built} -p - <&-; {SPECQD} passes >&-"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    one_sentence(Ended(2, done.stdout, done.stderr), "standard input is closed")
