"""The table of instruction sets, and the instructions that compiled functions are made of."""

from __future__ import annotations

import re

import pytest
from compiled import RUNNABLE, assembly, llama, lowered

from specqd.codegen.isa import TABLE, named
from specqd.errors import InputError

#: what an instruction set exists for, and what is beyond it: regular expressions over lines of assembly
INSTRUCTIONS: dict[str, tuple[list[str], list[str]]] = {
    "generic": ([r"mulps.*%xmm"], [r"%[yz]mm", r"^\tv"]),
    "avx2": (
        [r"vfmadd\w+ps.*%ymm", r"vpmaddubsw.*%ymm", r"vpshufb.*%ymm", r"vpmaddwd.*%ymm", r"vpsignb.*%ymm"],
        [r"%zmm", r"%[xy]mm(1[6-9]|2\d|3[01])", r"vpdpbusd", r"vdpbf16ps"],
    ),
    "avx512": (
        [r"vfmadd\w+ps.*%zmm", r"vpmaddubsw.*%zmm", r"vpshufb.*%zmm", r"vpmaddwd.*%zmm"],
        [r"vpdpbusd", r"vdpbf16ps"],
    ),
    "avx512_bf16": (
        [r"vdpbf16ps.*%zmm", r"vpdpbusd.*%zmm", r"vpshufb.*%zmm", r"vfmadd\w+ps.*%zmm"],
        [r"vpmaddubsw"],
    ),
    "amx": ([r"tdpbf16ps", r"tileloadd", r"vpdpbusd.*%zmm", r"vpshufb.*%zmm"], [r"vpmaddubsw"]),
}

#: calls for one number; sine and cosine of positions are all that may be left
CALLS = r"\b(fmaf?|expf|exp2f|tanhf|erff|powf|floorf|nearbyintf|roundf|rintf|fmaxf|fminf)\b"


def test_every_instruction_set_is_described() -> None:
    assert list(INSTRUCTIONS) == list(TABLE)[::-1]


@pytest.mark.parametrize("name", TABLE)
def test_functions_use_what_the_instruction_set_has(name: str) -> None:
    functions = [lowered(llama(), entry, 1, TABLE[name]) for entry in llama().chain]
    lines = assembly({f.symbol: f.function for f in functions}, TABLE[name]).splitlines()
    wanted, unwanted = INSTRUCTIONS[name]
    missing = [pattern for pattern in wanted if not any(re.search(pattern, line) for line in lines)]
    assert not missing
    present = [line for line in lines if any(re.search(pattern, line) for pattern in [*unwanted, CALLS])]
    assert not present, present[:5]


@pytest.mark.parametrize("name", TABLE)
def test_kernels_were_run_on(name: str) -> None:
    """The other modules of this suite run what this CPU has: the skips here say what they left out."""
    if name not in RUNNABLE:
        pytest.skip(f"this CPU has no {name}: its functions were compiled, not run")


@pytest.mark.parametrize("name", TABLE)
def test_native_is_the_best_that_the_cpu_has(name: str) -> None:
    features = frozenset(TABLE[name].features)
    assert named("native", features).name == name
    assert named("native", features | {"sse4_2", "unheard_of"}).name == name


@pytest.mark.parametrize("name", [name for name in TABLE if TABLE[name].features])
def test_one_missing_feature_rules_an_instruction_set_out(name: str) -> None:
    for missing in TABLE[name].features:
        assert named("native", frozenset(TABLE[name].features) - {missing}).name != name


def test_a_cpu_of_which_nothing_is_known_gets_generic_code() -> None:
    assert named("native").name == named("native", frozenset()).name == "generic"


def test_names_are_taken_as_they_are() -> None:
    assert {name: named(name).name for name in TABLE} == {name: name for name in TABLE}


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(InputError, match="no instruction set named 'avx1024'") as refused:
        named("avx1024")
    assert all(name in str(refused.value) for name in ("native", *TABLE))
