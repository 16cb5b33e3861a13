"""Damaged ONNX files: each must become a Program or a specqd error, within a time and a memory, or it is a find.

python benchmarks/fuzz_onnx.py --files 10000 --seed 0 --keep DIR
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from onnx import AttributeProto, TensorProto

__all__ = ["damaged", "seeds"]

SECONDS, BYTES = 30, 12 << 30
_NUMBERS = (0, 1, -1, 2, 13, 127, 255, 1 << 15, (1 << 31) - 1, 1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 63))


def seeds() -> list[bytes]:
    """Small models of many operators: node tests of the onnx package, and their expanded forms."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = [test.model.SerializeToString() for test in load_model_tests(kind="node")]
    return [model for model in models if len(model) < 20_000]


def damaged(seed: bytes, rng: random.Random) -> bytes:
    """Change a file: its bytes, or what they say."""
    if rng.random() < 0.4:
        return _changed_bytes(bytearray(seed), rng)
    model = onnx.ModelProto.FromString(seed)
    for _ in range(rng.randint(1, 3)):
        rng.choice(_CHANGES)(model, rng)
    return model.SerializeToString()


def _changed_bytes(data: bytearray, rng: random.Random) -> bytes:
    for _ in range(rng.randint(1, 4)):
        if not data:
            break
        at = rng.randrange(len(data))
        match rng.randrange(5):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at] = rng.randrange(256)
            case 2:
                del data[at:]
            case 3:
                del data[at : at + rng.randint(1, 8)]
            case 4:
                data[at:at] = data[rng.randrange(len(data)) :][: rng.randint(1, 32)]
    return bytes(data)


def _node(model: onnx.ModelProto, rng: random.Random) -> Any:
    return rng.choice(model.graph.node) if model.graph.node else onnx.NodeProto()


def _name(model: onnx.ModelProto, rng: random.Random) -> str:
    names = [name for node in model.graph.node for name in (*node.input, *node.output)]
    return rng.choice([*names, "", "nowhere", "x" * 300, "a.b/c", "\u00e9"])


def _rewired(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    side = rng.choice([node.input, node.output])
    if side and rng.random() < 0.8:
        side[rng.randrange(len(side))] = _name(model, rng)
    else:
        side.append(_name(model, rng))


def _renamed(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    kinds = [schema.name for schema in onnx.defs.get_all_schemas()]
    node.op_type = rng.choice([*kinds, "Nothing", ""])
    node.domain = rng.choice(["", "", "", "ai.onnx", "com.microsoft", "ai.onnx.ml"])


def _other_attribute(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    if not node.attribute or rng.random() < 0.2:
        names = [
            "axis",
            "axes",
            "perm",
            "pads",
            "to",
            "kernel_shape",
            "group",
            "mode",
            "value",
            "body",
            "nothing",
        ]
        node.attribute.append(onnx.helper.make_attribute(rng.choice(names), rng.choice([*_NUMBERS])))
        return
    one = rng.choice(node.attribute)
    match rng.randrange(5):
        case 0:
            one.i = rng.choice(_NUMBERS)
        case 1:
            one.ints[:] = [rng.choice(_NUMBERS) for _ in range(rng.randint(0, 5))]
        case 2:
            one.type = rng.choice(AttributeProto.AttributeType.values())
        case 3:
            one.f = rng.choice([0.0, -1.0, float("nan"), float("inf"), 1e30])
        case 4:
            one.name, one.s = rng.choice(["axis", "mode", one.name]), rng.choice([b"", b"\xff", b"linear"])


def _other_shape(model: onnx.ModelProto, rng: random.Random) -> None:
    if not model.graph.input:
        return
    kind = rng.choice(model.graph.input).type.tensor_type
    if rng.random() < 0.3:
        kind.elem_type = rng.choice(TensorProto.DataType.values())
    elif kind.shape.dim:
        one = rng.choice(kind.shape.dim)
        if rng.random() < 0.4:
            one.dim_param = rng.choice(["n", "m", "n+1", "", "1"])
        else:
            one.dim_value = rng.choice(_NUMBERS)
    else:
        kind.ClearField("shape")


def _tensor(model: onnx.ModelProto, rng: random.Random) -> TensorProto:
    held = [a.t for node in model.graph.node for a in node.attribute if a.type == AttributeProto.TENSOR]
    held += list(model.graph.initializer)
    return rng.choice(held) if held else model.graph.initializer.add()


def _other_tensor(model: onnx.ModelProto, rng: random.Random) -> None:
    one = _tensor(model, rng)
    match rng.randrange(5):
        case 0:
            one.dims[:] = [rng.choice(_NUMBERS) for _ in range(rng.randint(0, 4))]
        case 1:
            one.data_type = rng.choice(TensorProto.DataType.values())
        case 2:
            one.raw_data = one.raw_data[: rng.randint(0, max(len(one.raw_data), 1))]
        case 3:
            one.data_location = TensorProto.EXTERNAL
            place = one.external_data.add()
            place.key, place.value = (
                "location",
                rng.choice(["../x", "/etc/passwd", "", ".", "x\0y", "a" * 5000]),
            )
        case 4:
            one.int64_data[:] = [rng.choice(_NUMBERS) for _ in range(rng.randint(0, 4))]


def _bound(model: onnx.ModelProto, rng: random.Random) -> None:
    """Turn an input into a constant, so that what reads it is folded."""
    if model.graph.input:
        given = model.graph.input.pop(rng.randrange(len(model.graph.input)))
        numbers = [rng.choice(_NUMBERS) for _ in range(rng.randint(0, 4))]
        model.graph.initializer.append(
            onnx.helper.make_tensor(given.name, TensorProto.INT64, [len(numbers)], numbers)
        )


def _other_model(model: onnx.ModelProto, rng: random.Random) -> None:
    match rng.randrange(4):
        case 0:
            for one in model.opset_import:
                one.version = rng.choice([*_NUMBERS, 13, 17, 20, 23])
        case 1:
            model.graph.node.extend([_node(model, rng)])
        case 2:
            del model.graph.node[: rng.randint(1, 2)]
        case 3:
            model.graph.output.add().name = _name(model, rng)


_CHANGES: tuple[Callable[[onnx.ModelProto, random.Random], None], ...] = (
    _rewired, _renamed, _other_attribute, _other_attribute, _other_shape, _other_tensor, _bound, _other_model,
)  # fmt: skip


def _try_files(first: int, last: int, seed: int, keep: Path | None) -> None:
    """Say of each file, a JSON line before and one after, what came of it."""
    import logging

    import specqd
    from specqd.errors import SpecqdError

    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    models = seeds()

    def late(*_: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    for at in range(first, last):
        rng = random.Random(f"{seed} {at}")
        data = damaged(rng.choice(models), rng)
        print(json.dumps({"file": at}), flush=True)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            path.write_bytes(data)
            signal.alarm(SECONDS)
            try:
                specqd.capture(path)
                found = "captured"
            except SpecqdError:
                found = "refused"
            except BaseException as error:
                found = f"{type(error).__name__}: {error}"[:300]
            signal.alarm(0)
        if keep and found not in ("captured", "refused"):
            (keep / f"{seed}_{at}.onnx").write_bytes(data)
        print(json.dumps({"file": at, "found": found}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--quick", action="store_true", help="200 files")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a folder for the files that are finds")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    last = options.first + (200 if options.quick else options.files)
    if options.worker:
        _try_files(options.first, last, options.seed, options.keep)
        return
    counts: Counter[str] = Counter()
    finds: dict[int, str] = {}
    at = options.first
    while at < last:
        command = [sys.executable, __file__, "--worker", f"--first={at}", f"--files={last - at}"]
        command += [f"--seed={options.seed}", *([f"--keep={options.keep}"] if options.keep else [])]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout
        began, begun = at, False
        for line in process.stdout:
            answer = json.loads(line)
            at = answer["file"] + 1
            if "found" in answer:
                known = answer["found"] in ("captured", "refused")
                counts[answer["found"] if known else "finds"] += 1
                finds |= {} if known else {answer["file"]: answer["found"]}
                begun = False
            else:
                begun = True
        code = process.wait()
        if code and at == began:
            raise SystemExit(f"the worker ended with {code} before its first file")
        if begun:
            counts["finds"] += 1
            finds[at - 1] = f"the process ended with {code}"
    for file, what in finds.items():
        print(f"{file}: {what}")
    print(", ".join(f"{what} {count}" for what, count in counts.items()))
    if options.json:
        options.json.write_text(json.dumps({**counts, "finds": finds}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
