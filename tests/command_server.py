"""Runs the command line in processes of its own that need not import anything first: they are forked.

Importing torch, transformers and TVM takes seconds, and a test of bad input must see real exit codes and real
standard streams. So one process imports everything and forks for every command that it is told to run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["PIPELINE", "POSITIONS", "CommandServer", "Ended", "one_sentence"]

POSITIONS = 40
PIPELINE = ("--pipeline", f"insert-kv-cache{{capacity={POSITIONS}}}")
"""The fewest passes that a model can be compiled with."""


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (minus the signal that killed it) and what it printed."""

    code: int
    out: str
    err: str


def one_sentence(ended: Ended, *texts: str) -> None:
    """Check that a command was refused in one sentence that holds `texts`."""
    assert (ended.code, ended.out) == (2, ""), ended.err
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1
    for text in texts:
        assert text in ended.err, ended.err


class CommandServer:
    """Starts commands in `folder`; `env` is what their environment has beyond this process's."""

    def __init__(self, folder: Path, **env: str) -> None:
        self.folder = folder
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=folder,
            env={**os.environ, **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str | bytes, **how: Any) -> Ended:
        """Run a command to its end."""
        return self.wait(self.start(*arguments, **how))

    def start(self, *arguments: str | bytes, **how: Any) -> int:
        """Start a command and return its process's id.

        `how`: `env` is a table of further variables; `stdin` the bytes of standard input; `user` a user id to
        become; `pause` lets it stop for a minute when half the weights are written.
        """
        how["stdin"] = how.get("stdin", b"").decode("latin-1")
        texts = [os.fsdecode(argument) for argument in arguments]
        return self._ask({"arguments": texts, **how})["pid"]

    def wait(self, pid: int) -> Ended:
        """Wait for a command's end."""
        return Ended(**self._ask({"wait": pid}))

    def close(self) -> None:
        """End the server."""
        self._process.communicate()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def _serve() -> None:
    import tvm  # noqa: F401
    from transformers import AutoConfig, LlamaForCausalLM  # noqa: F401

    import specqd.codegen.library as library
    import specqd.frontends.loading
    import specqd.frontends.tracing
    import specqd.passes.quantize.cast_mxfp4  # noqa: F401

    # Each number of rows takes a second to compile.
    library.VERIFY_ROWS, library.PREFILL_ROWS = (1, 2), ()
    with tempfile.TemporaryDirectory() as streams:
        for line in sys.stdin:
            question = json.loads(line)
            if "wait" in question:
                answer = _ended(Path(streams), question["wait"])
            else:
                answer = {"pid": _forked(Path(streams), question)}
            print(json.dumps(answer), flush=True)


def _forked(streams: Path, question: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    for number in (0, 1, 2):
        path = streams / f"{os.getpid()}.{number}"
        path.write_bytes(question["stdin"].encode("latin-1") if number == 0 else b"")
        handle = os.open(path, os.O_RDWR)
        os.dup2(handle, number)
        os.close(handle)
    code = 1
    try:
        _run(question)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(question: dict[str, Any]) -> None:
    os.environ.update(question.get("env", {}))
    if question.get("pause"):
        import specqd.artifact

        specqd.artifact.write_weights = _pause
    if user := question.get("user"):
        os.setgroups([])
        os.setuid(user)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from specqd.cli import main

    main(question["arguments"])


def _pause(path: Path, *_: object) -> None:
    path.write_bytes(b"half")
    time.sleep(60)


def _ended(streams: Path, pid: int) -> dict[str, Any]:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    out, err = ((streams / f"{pid}.{number}").read_text("utf-8", "replace") for number in (1, 2))
    return {"code": code, "out": out, "err": err}


if __name__ == "__main__":
    _serve()
