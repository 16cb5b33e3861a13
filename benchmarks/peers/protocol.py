"""The worker's side of the conversation: one JSON request a line in, one JSON answer a line out.

A worker imports nothing of specqd, because it may run in another virtual environment.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

__all__ = ["serve", "timing"]

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


def timing(make: Callable[..., Callable[[], Any]]) -> Mapping[str, Handler]:
    """Return handlers of which `time` gives the median seconds of `repeats` calls of `make(**request)`, after one call.

    What is made is kept for the next time.
    """
    known: dict[str, Callable[[], Any]] = {}

    def seconds(repeats: int, **request: Any) -> dict[str, Any]:
        key = json.dumps(request)
        if key not in known:
            known[key] = make(**request)
        run, taken = known[key], []
        run()
        for _ in range(repeats):
            began = time.perf_counter()
            run()
            taken.append(time.perf_counter() - began)
        return {"seconds": median(taken)}

    return {"facts": dict, "time": seconds}
