"""specqd.codegen.build: functions, arguments, packed weights, the library and its cache; and what it refuses."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_programs
import torch
import tvm
import tvm_ffi
from compiled import NATIVE, array, jit, llama, lowered, threads, with_bf16_activations
from family_configs import FAMILIES, random_model
from torch import nn
from tvm.script.ir_builder import IRBuilder

from specqd.build import default_pipeline
from specqd.codegen import build, library
from specqd.codegen.checked_file import read_checked
from specqd.codegen.isa import TABLE
from specqd.codegen.tir import I, parallel, tirx
from specqd.errors import CodegenError
from specqd.frontends import capture
from specqd.manifest import Function
from specqd.passes import Pipeline
from specqd.program import Program
from specqd.reference import run
from specqd.runtime.library import tensor


@pytest.fixture
def program() -> Program:
    """A copy that a test may spoil."""
    return llama().copy()


VERIFIED = (*range(1, 9), 10, 12, 16)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile three functions, not twenty-five."""
    monkeypatch.setattr(library, "VERIFY_ROWS", (1,))
    monkeypatch.setattr(library, "PREFILL_ROWS", (32,))


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lower everything and leave TVM out."""
    monkeypatch.setattr(library, "_library", lambda *_: (b"", "x86_64-unknown-linux-gnu"))


def test_functions_and_their_arguments(program: Program, uncompiled: None) -> None:
    made = build(program, NATIVE)
    assert (made.isa, made.cpu_features) == (NATIVE.name, NATIVE.features)
    target = {f"target_{rows}": (rows, rows >= 32) for rows in (*VERIFIED, 32, 64, 128)}
    draft = {f"draft_{rows}": (rows, False) for rows in VERIFIED}
    assert {f.symbol: (f.rows, f.last_only) for f in made.functions} == target | draft
    vocabulary = program.model.vocab_size
    for function in made.functions:
        assert function.symbol == f"{function.entry}_{function.rows}"
        outputs = 1 if function.last_only else function.rows
        args = {arg.name: (arg.kind, arg.dtype, arg.shape) for arg in function.args}
        assert len(args) == len(function.args)
        assert args["tokens"] == ("tokens", "int32", (function.rows,))
        for name in ("positions", "tables"):
            assert args[name] == (name, "int32", (function.rows,))
        assert args["blocks"] == ("blocks", "int32", (1,))
        assert args["next"] == ("next", "int32", (outputs,))
        assert args["sums"] == ("sums", "float32", (outputs * 2,))
        assert args["logits"] == ("logits", "float32", (outputs * vocabulary,))
        # A block of 16 positions of two layers, one head of 12 channels; the draft shares the target's.
        caches = {name: facts for name, facts in args.items() if facts[0] == "cache"}
        planes, size = 2 * 1, 16 * 12
        wanted = {"kv_k": ("int32", size // 2), "kv_v": ("int16", size)}
        assert caches == {name: ("cache", dtype, (planes, each)) for name, (dtype, each) in wanted.items()}


def test_weights_are_packed_as_the_functions_read_them(program: Program, uncompiled: None) -> None:
    made = build(program, NATIVE)
    read = {arg.name: arg for f in made.functions for arg in f.args if arg.kind == "weight"}
    assert set(made.weights) == set(read) and len(made.weights) == len(read)
    for name, values in made.weights.items():
        assert (values.dtype.name, values.shape) == (read[name].dtype, read[name].shape), name
    assert {arg.dtype for arg in read.values()} == {"int32", "int8", "uint8", "float32"}
    # The tied table is one array, of which a lookup alone reads rows; its INT8 copy is the draft's head.
    table = [name for name in read if name.startswith("model.embed_tokens")]
    assert sorted(name.rpartition(".")[2] for name in table) == ["bf16", "int8", "int8_scales"]
    gathered = {f.entry: [arg.name for arg in f.args if arg.gathered] for f in made.functions}
    assert gathered == {"target": [], "draft": ["model.embed_tokens.weight.bf16"]}


@pytest.mark.usefixtures("few")
def test_the_library_runs_and_is_cached_by_content(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, int, int]] = []
    first = build(program, NATIVE, progress=lambda *news: told.append(news), cache=tmp_path / "lib")

    assert [done for _, done, _ in told] == [0, 1, 2, 3, 4] and {of for *_, of in told} == {4}
    assert [what for what, *_ in told[:3]] == [
        "lowering target for 1 rows",
        "lowering target for 32 rows",
        "lowering draft for 1 rows",
    ]
    stored = list((tmp_path / "lib").iterdir())
    assert [file.suffix for file in stored] == [".so"] and read_checked(stored[0]) == first.library

    # A copy: what is loaded must stay as it is until the process ends, and the file is damaged below.
    loaded = shutil.copy(stored[0], tmp_path / "loaded.so")
    module = tvm_ffi.load_module(str(loaded))
    module["stream_read"]
    for function in first.functions:
        tokens = [(7 * i) % program.model.vocab_size for i in range(function.rows)]
        logits = call(module[function.symbol], function, first.weights, tokens)
        rounded = with_bf16_activations(program, function.entry) if NATIVE.pairs else program
        wanted = run(rounded, rounded.entries[function.entry], torch.tensor([tokens]))[0, -1].numpy()
        np.testing.assert_allclose(logits, wanted, rtol=0, atol=0.01 if function.entry == "target" else 0.2)

    compiled: list[Any] = []
    monkeypatch.setattr(tvm, "compile", lambda *given, **_: compiled.append(given) or 1 / 0)
    again = build(program.copy(), NATIVE, cache=tmp_path / "lib")
    assert again.library == first.library and not compiled
    assert again.functions == first.functions

    with pytest.raises(CodegenError, match="TVM could not compile the program for generic: division by zero"):
        build(program, TABLE["generic"], cache=tmp_path / "lib")
    with pytest.raises(CodegenError, match="TVM could not compile"):
        build(program, NATIVE)
    assert list((tmp_path / "lib").iterdir()) == stored

    stored[0].write_bytes(first.library)
    with pytest.raises(CodegenError, match="TVM could not compile"):
        build(program, NATIVE, cache=tmp_path / "lib")


def call(symbol: Any, function: Function, weights: Any, tokens: list[int]) -> np.ndarray:
    """Call a function of a library with zeroed buffers, as its manifest describes it; return the logits."""
    count = {"cache": 8, "blocks": 10}  # blocks of positions: a prompt's piece has up to 128
    buffers = {
        arg.name: array((math.prod(arg.shape) * count.get(arg.kind, 1),), arg.dtype) for arg in function.args
    }
    for arg in function.args:
        if arg.kind == "weight":
            buffers[arg.name][:] = weights[arg.name]
    buffers["tokens"][:] = tokens
    buffers["positions"][:] = range(len(tokens))
    buffers["blocks"][:] = [0, 0, *range(7, -1, -1)]  # one table for all planes, nothing missing, its blocks
    symbol(*(tensor(buffers[arg.name]) for arg in function.args))
    assert np.array_equal(buffers["next"], buffers["logits"].reshape(len(buffers["next"]), -1).argmax(-1))
    return buffers["logits"]


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "nan"), [("mxfp4_scales", 255), ("int8_scales", float("nan"))])
def test_quantised_weights_that_hold_nan(form: str, nan: float, program: Program, uncompiled: None) -> None:
    broken = program.copy()
    name = next(n for n in broken.weights if n.endswith(form))
    broken.weights[name] = broken.weights[name].clone()
    broken.weights[name].view(-1)[-1] = nan
    weights = build(broken, NATIVE).weights
    with pytest.raises(CodegenError, match="holds NaN; repair the checkpoint") as refused:
        dict(weights)
    assert str(refused.value).startswith(name)


def unsupported(body: Callable[..., torch.Tensor], **members: nn.Module) -> str:
    """What codegen says about a small decoder."""
    with pytest.raises(CodegenError) as refused:
        lowered(small_programs.of(small_programs.Decoder(body, **members)), "target", 2)
    return str(refused.value)


class Sorted(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sort(x, dim=-1).values


def test_an_unknown_operator_is_named_with_its_module() -> None:
    message = unsupported(lambda self, x, positions: self.tidy(x), tidy=Sorted())
    assert "aten.sort.default" in message and "tidy" in message and "specqd explain" in message


def test_an_operator_in_a_form_that_has_no_kernel_is_named_too() -> None:
    assert "mean over dimensions [1]" in unsupported(lambda self, x, positions: x - x.mean(1, keepdim=True))


def test_a_float32_cache(program: Program) -> None:
    program.caches["kv"] = replace(program.caches["kv"], key_dtype="float32", value_dtype="float32")
    with pytest.raises(CodegenError, match="cache kv is float32; compiled code keeps its cache in bfloat16"):
        lowered(program, "target", 1)


# -- races ------------------------------------------------------------------------------------------------------------


def one_phase() -> Any:
    return I.attr(0, "pragma_parallel_barrier_when_finish", 1)


def test_a_parallel_loop_of_one_runs_once() -> None:
    """TVM drops a loop of one iteration, and all threads then run its body."""
    rounds = 2000
    count = tirx.decl_buffer((1,), "int32", "count")
    launch = I.attr(0, "pragma_parallel_launch_point", 1)
    with IRBuilder() as builder, launch, I.serial(0, rounds), one_phase(), parallel(1) as i:
        I.buffer_store(count, count[i] + 1, [i])
    function = tirx.PrimFunc([count], builder.get()).with_attr("global_symbol", "count_up")
    counter = array((1,), "int32")
    with threads(2):
        jit({"count_up": function})["count_up"](tensor(counter))
    assert counter[0] == rounds


def test_no_function_has_a_parallel_loop_of_one() -> None:
    """With residuals added in place, as Phi's, that gave wrong numbers on two threads."""
    program = Pipeline.parse(default_pipeline(32))(capture(random_model(FAMILIES["phi"]())))
    for made in (program, llama()):
        for entry in made.chain:
            text = lowered(made, entry, 1).function.script()
            extents = [int(extent) for extent in re.findall(r"T\.parallel\((\d+)\)", text)]
            assert len(extents) > 10 and min(extents) > 1
