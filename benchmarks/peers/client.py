"""The benchmark's side of the conversation with a peer's process, which is idle between requests."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["Peer"]

_HERE = Path(__file__).parent


class Peer:
    """A running worker; `facts` is what it said of itself when it was ready.

    Raises:
        RuntimeError: the worker ended; the message holds the end of what it wrote.
    """

    def __init__(self, python: Path, worker: str, *arguments: str) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed with the worker
        self._process = subprocess.Popen(
            [str(python), str(_HERE / f"{worker}.py"), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            bufsize=1,
        )
        self.pid = self._process.pid
        self.facts = self._answer()

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Send one request and wait for its answer."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
        return self._answer()

    def decode(self, model: str, prompt: Sequence[int], new_tokens: int) -> dict[str, Any]:
        """Greedy decoding: `tokens` (the new ones), `decode_s` (of all of them but the first)."""
        return self.ask("decode", model=model, prompt=list(prompt), new_tokens=new_tokens)

    def prefill(self, model: str, prompt: Sequence[int]) -> float:
        """Seconds from an empty cache to the token after the prompt."""
        return float(self.ask("prefill", model=model, prompt=list(prompt))["seconds"])

    def seconds(self, repeats: int, **request: Any) -> float:
        """Median seconds of so many calls of what the request makes, from a worker that serves `timing`."""
        return float(self.ask("time", repeats=repeats, **request)["seconds"])

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._log.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            raise RuntimeError(f"{self._process.args} ended: {self._log.read()[-2000:]}")
        return dict(json.loads(line))
