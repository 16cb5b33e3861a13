"""The worker's side of the conversation: one JSON request a line in, one JSON answer a line out.

A worker imports nothing of specqd, because it may run in another virtual environment.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["serve"]

Handler = Callable[..., dict[str, Any]]


def serve(start: Callable[[], Mapping[str, Handler]]) -> None:
    """Call `start` for the handlers, say that they are ready, then answer `{"do": name, ...}` until input ends.

    Standard output is taken over first: libraries print there, and would garble the answers.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    handlers = start()
    print(json.dumps(handlers["facts"]()), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(handlers[request.pop("do")](**request)), file=answers)
