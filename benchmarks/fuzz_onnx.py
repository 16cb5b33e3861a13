"""Damaged ONNX files: each must become a Program or a specqd error, within a time and a memory, or it is a find.

    python benchmarks/coverage.py --suite onnx-fuzz --limit 30 | grep crashed

A file is known by its number: `--only 17 12345` tries those, of which the suite has the first ten thousand.
"""

from __future__ import annotations

import functools
import logging
import random
import resource
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from onnx import AttributeProto, TensorProto

import specqd
from specqd.errors import SpecqdError

__all__ = ["attempt", "damaged", "names"]

_BYTES = 12 << 30
_NUMBERS = (*range(-1, 27), 127, 255, 1 << 15, (1 << 31) - 1, 1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 63))


@functools.cache
def _seeds() -> list[bytes]:
    """Small models of many operators: node tests of the onnx package, and their expanded forms."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = [test.model.SerializeToString() for test in load_model_tests(kind="node")]
    return [model for model in models if len(model) < 20_000]


def names() -> list[str]:
    """Numbers of files."""
    return [str(number) for number in range(10_000)]


def attempt(name: str) -> tuple[str, str]:
    """Say `passed` of a file that becomes a Program, `refused`, or what else came of it; with the reason."""
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    logging.disable(logging.CRITICAL)
    rng = random.Random(name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(damaged(rng.choice(_seeds()), rng))
        try:
            specqd.capture(path)
        except SpecqdError as error:
            return "refused", str(error)
        except BaseException as error:
            return "crashed", f"{type(error).__name__}: {error}"
    return "passed", ""


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


def _parts(message: Any) -> Iterator[Any]:
    """Return a message and all that it holds."""
    yield message
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for part in value if hasattr(value, "append") else [value]:
                yield from _parts(part)


def _changed_part(model: onnx.ModelProto, rng: random.Random) -> None:
    """Change a field of the model or of a part of it, mostly one that is given."""
    part = rng.choice([*_parts(model)])
    given = [field for field, _ in part.ListFields()]
    field = rng.choice(given if given and rng.random() < 0.8 else part.DESCRIPTOR.fields)
    held = getattr(part, field.name)
    repeated = hasattr(held, "append")
    if field.type == field.TYPE_MESSAGE:
        if not repeated:
            part.ClearField(field.name)
        elif held and rng.random() < 0.5:
            del held[rng.randrange(len(held))]
        else:
            held.append(rng.choice(held) if held else type(held.add())())
        return
    values = _values(field, part, model)
    if repeated:
        kept = [one if rng.random() < 0.7 else rng.choice(values) for one in held]
        held[:] = kept[: rng.randint(0, len(kept) + 2)] + [rng.choice(values)] * rng.randint(0, 2)
    elif isinstance(held, bytes) and rng.random() < 0.5:
        setattr(part, field.name, held[: rng.randint(0, len(held))])
    else:
        setattr(part, field.name, rng.choice(values))


def _values(field: Any, part: Any, model: onnx.ModelProto) -> list[Any]:
    """What a field may become."""
    if field.cpp_type == field.CPPTYPE_ENUM:
        return [one.number for one in field.enum_type.values]
    if field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return [0.0, -1.0, float("nan"), float("inf"), 1e30]
    if field.type == field.TYPE_BYTES:
        return [b"", b"\xff", b"linear", b"SAME_UPPER"]
    if field.cpp_type == field.CPPTYPE_INT32:
        return [n for n in _NUMBERS if -(1 << 31) <= n < 1 << 31]
    if field.cpp_type == field.CPPTYPE_UINT64:
        return [n for n in _NUMBERS if n >= 0]
    if field.cpp_type != field.CPPTYPE_STRING:
        return list(_NUMBERS)
    if field.name == "op_type":
        return [*(schema.name for schema in onnx.defs.get_all_schemas()), "Nothing", ""]
    if field.name == "domain":
        return ["", "", "", "ai.onnx", "com.microsoft", "ai.onnx.ml"]
    if isinstance(part, AttributeProto):
        return [*(name for one in onnx.defs.get_all_schemas() for name in one.attributes), "nothing"]
    names = [name for node in model.graph.node for name in (*node.input, *node.output)]
    return [*names, "", "nowhere", "n", "n+1", "x" * 300, "a.b/c", "\u00e9"]


def _outside(model: onnx.ModelProto, rng: random.Random) -> None:
    """Say that a tensor lies in another file."""
    one = rng.choice([part for part in _parts(model) if isinstance(part, TensorProto)] or [TensorProto()])
    one.data_location = TensorProto.EXTERNAL
    place = rng.choice(["../x", "/etc/passwd", "", ".", "x\0y", "a" * 5000, "model.onnx"])
    one.external_data.add(key="location", value=place)


def _bound(model: onnx.ModelProto, rng: random.Random) -> None:
    """Turn an input into a constant, so that what reads it is folded."""
    if model.graph.input:
        given = model.graph.input.pop(rng.randrange(len(model.graph.input)))
        numbers = [rng.choice(_NUMBERS) for _ in range(rng.randint(0, 4))]
        model.graph.initializer.append(
            onnx.helper.make_tensor(given.name, TensorProto.INT64, [len(numbers)], numbers)
        )


_CHANGES = (*[_changed_part] * 6, _outside, _bound)
