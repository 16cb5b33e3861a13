"""An ONNX model becomes a Program of one entry."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor
from torch.export import Dim

from specqd.errors import CaptureError, InputError
from specqd.frontends.torch_export import capture_module
from specqd.program import Program

from .coded import CODES, Coded, is_coded
from .graph import Given
from .reading import read
from .running import OnnxModule
from .tensors import dtype_of, name_of

__all__ = ["capture_onnx"]

#: sizes that stand for those that are left open; no two alike, so that none is taken for another
_EXAMPLES = (5, 7, 6, 9, 11, 13, 10, 15, 17, 19)
_LARGEST = 1 << 28


def capture_onnx(
    source: str | Path | onnx.ModelProto,
    example_inputs: Sequence[Any] | None = None,
    sizes: Mapping[str, Any] | None = None,
) -> Program:
    """Return a Program whose entry `target` computes what an ONNX model computes.

    1. Placeholders are the model's inputs, in their order. Types that torch does not compute in are held a byte an
       element: uint8 codes of 8- and 4-bit floats, int8 or uint8 values of smaller integers.
    2. Weights are its initialisers, and what can be computed from them, under the names of those values.
    3. Sizes that the model names stay open, one for each name.
    4. Functions and operators that ONNX defines by others are taken apart; branches and loops whose course is known
       are chosen and unrolled.

    Args:
        source: a path, whose folder may hold the model's external data, or a model.
        example_inputs: a tensor or array for each input, whose sizes serve as examples; or None, to make one up. A
            number or a list of numbers is no example: the input always has that value, and is none of the Program's.
        sizes: by the names of open sizes: a number that fixes one, or a torch.export.Dim that says its range.

    Raises:
        InputError: the file is no ONNX, damaged or hostile, or an argument does not fit the model.
        CaptureError: the model holds what cannot be compiled; names the node and the reason.
    """
    model = read(source)
    given = list(example_inputs) if example_inputs is not None else [None] * len(model.graph.inputs)
    if len(given) != len(model.graph.inputs):
        names = ", ".join(one.name for one in model.graph.inputs)
        raise InputError(
            f"{model.source} takes {len(model.graph.inputs)} inputs ({names}), and there are {len(given)} examples"
        )
    sizes = dict(sizes or {})
    named = _names(model.graph.inputs, sizes)
    bound = {
        one.name: _bound(one, value, named)
        for one, value in zip(model.graph.inputs, given, strict=True)
        if isinstance(value, bool | int | float | list)
    }
    rest = [
        (one, value) for one, value in zip(model.graph.inputs, given, strict=True) if one.name not in bound
    ]
    examples = tuple(_example(one, value, named) for one, value in rest)
    shapes = tuple(_dynamic(one, x, named) for (one, _), x in zip(rest, examples, strict=True))
    module = OnnxModule(model.graph, model.functions, bound)
    try:
        program = capture_module(module, examples, shapes or None)
    except CaptureError as error:
        if "Constraints violated" not in str(error):
            raise
        raise CaptureError(
            f"{error}; a size that the model names has to be what it is: fix it, as dynamic_shapes={{'name': 8}}"
        ) from error
    return replace(program, model=replace(program.model, family="onnx", source=model.source))


def _bound(one: Given, value: Any, named: dict[str, Any]) -> Any:
    """Return an input's one value as a tensor of its type."""
    coded = is_coded(one.type)
    dtype = CODES[one.type] if coded else dtype_of(one.type, f"the input {one.name!r}")
    try:
        tensor = torch.tensor(value, dtype=dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"the input {one.name!r} cannot always be {value!r}: {error}") from error
    if not _fits(tensor, one, named):
        raise InputError(f"the input {one.name!r} cannot always be {value!r}: it is {_sizes(one)}")
    return Coded(tensor, one.type) if coded else tensor


def _names(inputs: Sequence[Given], fixed: dict[str, Any]) -> dict[str, Any]:
    """Map the names of open sizes to numbers that fix them, or to what torch.export takes for them."""
    names = dict.fromkeys(size for one in inputs for size in one.shape or () if isinstance(size, str))
    unknown = next((name for name in fixed if name not in names), None)
    if unknown is not None:
        raise InputError(f"the model has no size {unknown!r}; it names {', '.join(names) or 'none'}")
    wrong = next((n for n, v in fixed.items() if isinstance(v, bool) or not isinstance(v, int | Dim)), None)
    if wrong is not None or any(isinstance(v, int) and v < 0 for v in fixed.values()):
        raise InputError(
            f"dynamic_shapes of an ONNX model is a number or a torch.export.Dim by name, not {fixed}"
        )
    return {name: fixed.get(name, Dim(_identifier(f"size_{name}"))) for name in names}


def _example(one: Given, value: Any, named: dict[str, Any]) -> Tensor:
    where = f"the input {one.name!r}"
    dtype = CODES[one.type] if is_coded(one.type) else dtype_of(one.type, where)
    if value is not None:
        tensor = _given(value)
        if not isinstance(tensor, Tensor) or tensor.dtype != dtype or not _fits(tensor, one, named):
            kind = (
                f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(value).__name__
            )
            raise InputError(f"{where} takes {name_of(one.type)} {_sizes(one)}, and its example is {kind}")
        return tensor
    if one.shape is None:
        raise InputError(f"{where} says no shape; give an example of each input in example_inputs")
    order = {name: at for at, name in enumerate(named)}
    shape = []
    for at, size in enumerate(one.shape):
        size = named.get(size, size) if isinstance(size, str) else size
        if not isinstance(size, int):
            name = one.shape[at]
            place = order[name] if isinstance(name, str) else len(order) + at
            low, high = getattr(size, "min", 0), getattr(size, "max", 1 << 31)
            size = max(low, min(high, _EXAMPLES[place % len(_EXAMPLES)]))
        shape.append(size)
    if math.prod(shape) > _LARGEST:
        raise InputError(f"{where} has the shape {shape}, which is more than memory holds")
    return torch.zeros(shape, dtype=dtype)


def _given(value: Any) -> Any:
    """Return an array as a tensor, and what torch has no type for as it is."""
    if not isinstance(value, np.ndarray):
        return value
    try:
        return torch.from_numpy(np.require(value, requirements=["C", "W"]))
    except (TypeError, ValueError):
        return value


def _fits(tensor: Tensor, one: Given, named: dict[str, Any]) -> bool:
    if one.shape is None:
        return True
    wanted = [named.get(size, size) if isinstance(size, str) else size for size in one.shape]
    return tensor.dim() == len(wanted) and all(
        got == size for got, size in zip(tensor.shape, wanted, strict=True) if isinstance(size, int)
    )


def _sizes(one: Given) -> str:
    if one.shape is None:
        return "of any rank"
    return f"[{', '.join('?' if size is None else str(size) for size in one.shape)}]"


def _dynamic(one: Given, example: Tensor, named: dict[str, Any]) -> dict[int, Any] | None:
    """Say to torch.export which sizes of an input stay open."""
    if one.shape is None:
        return None
    found = {}
    for axis, size in enumerate(one.shape):
        if isinstance(size, int) or isinstance(named.get(size or ""), int):
            continue
        found[axis] = named[size] if size else Dim(_identifier(f"size_{one.name}_{axis}"))
    return found or None


def _identifier(name: str) -> str:
    return re.sub(r"\W", "_", name)
