"""The command line: one module a verb."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn, cast

from specqd.cli.faults import sentence
from specqd.errors import SpecqdError

__all__ = ["main"]

# The modules that attach their verbs to the application when they are imported.
_VERBS = (
    "bench", "compile", "demo", "diff", "explain", "fetch", "generate", "inspect", "passes", "profile", "rewrite",
    "synthesize", "tune",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit.

    The exit code is 0 when done, 2 for wrong usage or an error that the user can mend, 130 and 143 after SIGINT and
    SIGTERM, which remove what was half made, and 1, without a word, when nobody reads the output any more.
    """
    if sys.stdout is None:  # the shell closed it
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    with _noted_signals() as received:
        try:
            code = _run(sys.argv[1:] if arguments is None else arguments, received)
            # What is still buffered would otherwise fail where nothing can be said about it.
            sys.stdout.flush()
        except KeyboardInterrupt:
            code = 128 + signal.SIGINT
        except BrokenPipeError:
            code = 1
        except Exception as error:
            said = sentence(error)
            if received:
                code = 128 + received[0]
            elif said is None:
                raise
            else:
                code = 2
                print(f"error: {' '.join(said.split())}", file=sys.stderr)
    _end_output()
    sys.exit(code)


def _run(arguments: Sequence[str], received: list[int]) -> int:
    """Return the exit code of a command; raises what the command raises, wrong usage as SpecqdError.

    The command finds the signals `received` so far as its context's `obj`.
    """
    import typer

    from specqd.cli.app import app

    for module in _VERBS:
        import_module(f"specqd.cli.{module}")

    # Of its errors of usage typer has a public name for this kind alone.
    usage_error = cast(type[Exception], typer.BadParameter.__base__)
    try:
        given = list(arguments) or ["--help"]
        return app(args=given, prog_name="specqd", standalone_mode=False, obj=received) or 0
    except typer.Abort:
        return 130
    except usage_error as error:
        what = error.format_message().rstrip(".")  # type: ignore[attr-defined]
        command = error.ctx.command_path if error.ctx else "specqd"  # type: ignore[attr-defined]
        raise SpecqdError(f"{what[:1].lower()}{what[1:]}; see `{command} --help`") from error


@contextlib.contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """Let SIGINT and SIGTERM unwind the stack, so that cleaning up is done, and yield the list of those that came.

    The exceptions alone would not do: TVM makes errors of its own from those that pass through it, and one that is
    raised while Python collects garbage is lost.
    """
    received: list[int] = []

    def note(number: int, _: object) -> NoReturn:
        received.append(number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_output() -> None:
    """Write out what is buffered, or drop it where that fails: Python would try again at exit, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)
