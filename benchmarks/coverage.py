"""How much of what others wrote compiles, and is right: OpInfo samples, ONNX node tests, timm and transformers models.

Each case is compiled and compared with eager torch in a worker process, so that a crash is counted, not suffered.

    python benchmarks/coverage.py --suite opinfo --quick
    python benchmarks/coverage.py --suite opinfo --workers 8 --minutes 15 --json opinfo.json --resume
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from coverage_cases import SUITES, names
from machine import facts, versions

__all__: list[str] = []

_WORKER = Path(__file__).parent / "coverage_cases.py"
OUTCOMES = ("passed", "refused", "wrong", "unstable", "crashed", "skipped", "not reached")
#: seconds between writes of the results so far
_EVERY = 10.0

Case = dict[str, str]


class Worker:
    """A process that tries cases; it is replaced when it dies or takes too long."""

    def __init__(self, suite: str, threads: int) -> None:
        self._command = [sys.executable, str(_WORKER), suite]
        given = {"OMP_NUM_THREADS": str(threads), "TVM_NUM_THREADS": str(threads)}
        self._environment = given | os.environ
        self._process: subprocess.Popen[str] | None = None

    def ask(self, name: str, limit: float) -> Case:
        """Return what became of a case, which may take so many seconds."""
        process = self._process = self._process or subprocess.Popen(
            self._command,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdin
        assert process.stdout
        late = threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(limit, stop)
        timer.start()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(name + "\n")
            process.stdin.flush()
        answer = process.stdout.readline()
        timer.cancel()
        if answer:
            found: Case = json.loads(answer)
            return found
        self._process = None
        code = process.wait()
        why = f"it took more than {limit:.0f} s" if late.is_set() else f"the process ended with {code}"
        return {"case": name, "outcome": "crashed", "why": why}


def _attempts(
    suite: str, chosen: Iterable[str], workers: int, limit: float, minutes: float
) -> Iterable[Case]:
    """Try cases side by side, and yield each that was tried before the time was up."""
    end = time.monotonic() + 60 * minutes
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    local = threading.local()

    def attempt(name: str) -> Case | None:
        left = end - time.monotonic()
        if left <= 0:
            return None
        if not hasattr(local, "worker"):
            local.worker = Worker(suite, threads)
        found: Case = local.worker.ask(name, min(limit, left))
        return found if time.monotonic() < end else None

    with ThreadPoolExecutor(workers) as pool:
        for future in as_completed([pool.submit(attempt, name) for name in chosen]):
            if found := future.result():
                yield found


def _result(known: list[str], found: dict[str, Case]) -> dict[str, Any]:
    cases = [found[name] for name in known if name in found]
    counts = Counter(case["outcome"] for case in cases) + Counter({"not reached": len(known) - len(cases)})
    made_by = facts() | versions(
        "specqd", "apache-tvm", "torch", "onnx", "timm", "torchvision", "transformers"
    )
    return {outcome: counts[outcome] for outcome in OUTCOMES} | {"cases": cases, "machine": made_by}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", required=True, choices=SUITES)
    parser.add_argument(
        "--quick", action="store_true", help="about four samples of each operator, a tenth of the rest"
    )
    parser.add_argument("--only", nargs="*", help="these cases alone, or all samples of these operators")
    parser.add_argument("--part", default="0/1", help="this part of so many, such as 2/8")
    parser.add_argument("--workers", type=int, default=1, help="cases that are tried side by side")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds that a case may take")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no case after so many")
    parser.add_argument(
        "--resume", action="store_true", help="keep what passed in --json FILE, and try the rest"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.resume and not options.json:
        parser.error("--resume needs --json FILE, which holds what is kept")

    found: dict[str, Case] = {}
    if options.resume and options.json.exists():
        found = {case["case"]: case for case in json.loads(options.json.read_text("utf-8"))["cases"]}
    every = names(options.suite, options.quick)
    asked = [one for one in every if not options.only or {one, one.rpartition(" ")[0]} & {*options.only}]
    part, parts = map(int, options.part.split("/"))
    asked = asked[part::parts]
    wanted = {*asked}
    known = [name for name in every if name in found or name in wanted]
    chosen = [name for name in asked if found.get(name, {}).get("outcome") not in ("passed", "skipped")]

    def write() -> None:
        if options.json:
            options.json.write_text(json.dumps(_result(known, found), indent=1) + "\n", "utf-8")

    written = time.monotonic()
    for case in _attempts(options.suite, chosen, options.workers, options.limit, options.minutes):
        found[case["case"]] = case
        if time.monotonic() > written + _EVERY:
            write()
            written = time.monotonic()
    write()
    result = _result(known, found)
    for case in result["cases"]:
        if case["outcome"] != "passed":
            print(f"{case['outcome']:8} {case['case']}: {case['why'].strip().splitlines()[0][:200]}")
    print(", ".join(f"{outcome} {result[outcome]}" for outcome in OUTCOMES))


if __name__ == "__main__":
    main()
