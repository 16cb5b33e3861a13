"""The cases of each suite of benchmarks/coverage.py, and the worker that tries them: one JSON line in, one out."""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from coverage_models import TIMM, TRANSFORMERS, timm_model, transformers_model
from torch import nn
from torch.utils import _pytree as pytree

import specqd
from specqd.errors import CaptureError, CodegenError, ContractError, InputError, SpecqdError

__all__ = ["CASES", "names"]

#: of an output's largest element, and of each element
TOLERANCE = 1e-4

Case = tuple[str, nn.Module, tuple[Any, ...]]


class Call(nn.Module):
    """A function of the tensors among nested arguments; the rest stays as it is."""

    def __init__(self, function: Callable[..., Any], arguments: Any) -> None:
        super().__init__()
        self.function = function
        self.leaves, self.spec = pytree.tree_flatten(arguments)
        self.places = [at for at, leaf in enumerate(self.leaves) if isinstance(leaf, torch.Tensor)]

    def forward(self, *tensors: torch.Tensor) -> Any:
        leaves = list(self.leaves)
        for at, tensor in zip(self.places, tensors, strict=True):
            leaves[at] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.function(*args, **kwargs)


def _operators() -> dict[str, Any]:
    from torch.testing._internal.common_methods_invocations import op_db

    found = {}
    for info in op_db:
        if torch.float32 in info.supported_dtypes("cpu") and _in_scope(info):
            found[f"{info.name}.{info.variant_test_name}".rstrip(".")] = info
    return found


def _in_scope(info: Any) -> bool:
    """Core ATen operators, and the layers of torch.nn.functional."""
    packet = getattr(torch.ops.aten, info.aten_name or info.name, None)
    core = packet is not None and any(torch.Tag.core in getattr(packet, o).tags for o in packet.overloads())
    return core or info.name.startswith("nn.functional.")


def _opinfo(name: str, quick: bool) -> Iterator[Case]:
    info = _operators()[name]
    torch.manual_seed(0)
    samples = list(info.sample_inputs("cpu", torch.float32))
    step = max(1, len(samples) // 4) if quick else 1
    for at, sample in enumerate(samples[::step]):
        module = Call(info.op, ((sample.input, *sample.args), sample.kwargs))
        tensors = tuple(module.leaves[place].detach() for place in module.places)
        yield f"{name} {at * step}", module, tensors


def _node_test(name: str) -> tuple[str, str]:
    import coverage_onnx

    return coverage_onnx.attempt(name, coverage_onnx.compiled, (SpecqdError,))


def _node_test_in_tvm(name: str) -> tuple[str, str]:
    import coverage_onnx
    import coverage_tvm

    return coverage_onnx.attempt(name, coverage_tvm.imported, (coverage_tvm.RefusedError,))


def _damaged_file(name: str) -> tuple[str, str]:
    import fuzz_onnx

    return fuzz_onnx.attempt(name)


def _models(make: Callable[[str], Iterator[Case]]) -> Callable[[str, bool], Iterator[Case]]:
    return lambda name, quick: make(name)


CASES: dict[str, Callable[[str, bool], Iterator[Case]]] = {
    "opinfo": _opinfo,
    "timm": _models(timm_model),
    "transformers": _models(transformers_model),
}


#: suites of which a name is one case, with expected outputs of its own
TESTS: dict[str, Callable[[str], tuple[str, str]]] = {
    "onnx-node": _node_test,
    "onnx-node-tvm": _node_test_in_tvm,
    "onnx-fuzz": _damaged_file,
}


def names(suite: str) -> list[str]:
    """What a suite tries, a name for each request to a worker."""
    if suite == "onnx-fuzz":
        import fuzz_onnx

        return fuzz_onnx.names()
    if suite in TESTS:
        import coverage_onnx

        return coverage_onnx.names()
    if suite == "opinfo":
        return list(_operators())
    return list(TIMM if suite == "timm" else TRANSFORMERS)


def outcome(module: nn.Module, tensors: tuple[Any, ...]) -> tuple[str, str] | None:
    """Say `passed`, `refused`, `wrong` or `crashed`, and why; None for what eager torch cannot do either."""
    try:
        with torch.no_grad():
            wanted = module(*(tensor.clone() for tensor in tensors))
    except Exception:
        return None
    expected = [leaf for leaf in pytree.tree_leaves(wanted) if isinstance(leaf, torch.Tensor)]
    if not tensors or not expected:
        return None
    try:
        with tempfile.TemporaryDirectory() as folder:
            specqd.compile(module, Path(folder) / "artifact", example_inputs=tensors)
            got = specqd.load(Path(folder) / "artifact")(*tensors)
    except (CaptureError, CodegenError, ContractError, InputError) as error:
        return "refused", f"{error}"
    except Exception as error:
        return "crashed", f"{type(error).__name__}: {error}"
    try:
        for a, b in zip(got if isinstance(got, tuple) else (got,), expected, strict=True):
            scale = (
                float(b[b.isfinite()].abs().max()) if b.is_floating_point() and b.isfinite().any() else 0.0
            )
            torch.testing.assert_close(
                a, b, rtol=TOLERANCE, atol=TOLERANCE * max(scale, 1e-2), equal_nan=True
            )
    except (AssertionError, ValueError) as error:
        return "wrong", str(error)
    return "passed", ""


def _attempts(suite: str, name: str, quick: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    if suite in TESTS:
        yield name, lambda: TESTS[suite](name)
        return
    for label, module, tensors in CASES[suite](name, quick):
        yield label, functools.partial(outcome, module, tensors)


def main() -> None:
    suite, quick = sys.argv[1], sys.argv[2] == "quick"
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        name = line.strip()
        try:
            for label, attempt in _attempts(suite, name, quick):
                print(json.dumps({"begin": label}), file=answers)
                found = attempt() or ("skipped", "eager torch cannot run it, or it has no tensor")
                print(json.dumps({"case": label, "outcome": found[0], "why": found[1][:600]}), file=answers)
        except Exception as error:
            why = f"it cannot be made: {type(error).__name__}: {error}"
            print(json.dumps({"case": name, "outcome": "skipped", "why": why[:600]}), file=answers)
        print(json.dumps({"done": name}), file=answers)


if __name__ == "__main__":
    main()
