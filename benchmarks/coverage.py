"""How much of what others wrote compiles, and is right: OpInfo samples, ONNX node tests, timm and transformers models.

Each case is compiled and compared with eager torch in a worker process, so that a crash is counted, not suffered.

    python benchmarks/coverage.py --suite opinfo --quick
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

__all__: list[str] = []

_WORKER = Path(__file__).parent / "coverage_cases.py"
#: onnx-node-tvm: TVM's own importer, on the tests of onnx-node; onnx-fuzz: damaged files, captured only
SUITES = ("opinfo", "onnx-node", "onnx-node-tvm", "onnx-fuzz", "timm", "transformers")
OUTCOMES = ("passed", "refused", "wrong", "crashed", "skipped")


class Worker:
    """A process that tries cases; it is replaced when it dies or takes too long."""

    def __init__(self, suite: str, quick: bool, limit: float) -> None:
        self._command = [sys.executable, str(_WORKER), suite, "quick" if quick else "all"]
        self._limit = limit
        self._process: subprocess.Popen[str] | None = None

    def ask(self, name: str) -> list[dict[str, Any]]:
        """Return the cases of a name."""
        if self._process is None:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        process = self._process
        assert process.stdin
        assert process.stdout
        process.stdin.write(name + "\n")
        process.stdin.flush()
        found: list[dict[str, Any]] = []
        begun: str | None = None
        timer = threading.Timer(self._limit, process.kill)
        timer.start()
        for line in process.stdout:
            answer = json.loads(line)
            if "done" in answer:
                timer.cancel()
                return found
            begun = answer.get("begin", begun)
            if "case" in answer:
                found.append(answer)
                begun = None
        timer.cancel()
        self._process = None
        code = process.wait()
        found.append({"case": begun or name, "outcome": "crashed", "why": f"the process ended with {code}"})
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", required=True, choices=SUITES)
    parser.add_argument("--quick", action="store_true", help="a few samples of each operator, a few models")
    parser.add_argument("--only", nargs="*", help="these names alone")
    parser.add_argument("--part", default="0/1", help="this part of so many, such as 2/8")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds that one name may take")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from coverage_cases import names

    part, parts = map(int, options.part.split("/"))
    known = names(options.suite)
    chosen = (
        options.only or (known[::10] if options.quick and options.suite != "opinfo" else known)[part::parts]
    )
    local = threading.local()

    def attempt(name: str) -> list[dict[str, Any]]:
        if not hasattr(local, "worker"):
            local.worker = Worker(options.suite, options.quick, options.limit)
        return list(local.worker.ask(name))

    with ThreadPoolExecutor(options.workers) as pool:
        cases = [case for found in pool.map(attempt, chosen) for case in found]
    counts = Counter(case["outcome"] for case in cases)
    result = {**{outcome: counts[outcome] for outcome in OUTCOMES}, "cases": cases}
    for case in cases:
        if case["outcome"] != "passed":
            print(f"{case['outcome']:8} {case['case']}: {case['why'].strip().splitlines()[0][:200]}")
    print(", ".join(f"{outcome} {counts[outcome]}" for outcome in OUTCOMES))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
