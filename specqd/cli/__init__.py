"""The command line: one module a verb."""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence

from specqd.errors import SpecqdError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 2 wrong usage or an error the user can mend, 130 interrupted."""
    try:
        from specqd.cli import bench, compile, demo, explain, fetch, generate, inspect, passes  # noqa: F401
        from specqd.cli.app import app

        app(args=arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except SpecqdError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        _fail(f"no space left on the disk of {error.filename or 'a temporary file'}: make room and try again")


def _fail(sentence: str) -> None:
    print(f"error: {' '.join(sentence.split())}", file=sys.stderr)
    sys.exit(2)
