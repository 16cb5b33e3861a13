"""Every dense family, compiled with cache and draft, decoded step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from compiled import Compiled, lowered, random_tokens, threads
from family_configs import FAMILIES, MIXTURES, random_model
from transformers import AutoModelForCausalLM, PretrainedConfig

from specqd.build import default_pipeline
from specqd.errors import CodegenError
from specqd.frontends import capture
from specqd.passes import Pipeline
from specqd.program import Program
from specqd.reference import run

ops = torch.ops.specqd
LENGTH = 24
DENSE = [name for name in FAMILIES if name not in MIXTURES]


def config(family: str) -> PretrainedConfig:
    """The family's tiny configuration, with a stream of 96 channels: blocks of 32 are what MXFP4 casts."""
    made = FAMILIES[family]()
    width = "n_embd" if family == "gpt2" else "hidden_size"
    setattr(made, width, 96)
    if getattr(made, "head_dim", None) == 48 // 6:
        made.head_dim = 96 // 6
    return made


def compilable(family: str) -> Program:
    first = "conv1d-to-linear, " if family == "gpt2" else ""
    return Pipeline.parse(first + default_pipeline(32))(capture(random_model(config(family))))


@dataclass(frozen=True)
class Family:
    """A compiled family, the tokens fed to it, and what it gave for them one at a time."""

    name: str
    compiled: Compiled
    tokens: list[int]
    target: np.ndarray
    draft: np.ndarray


@pytest.fixture(scope="module", params=DENSE)
def family(request: pytest.FixtureRequest) -> Iterator[Family]:
    program = compilable(request.param)
    made = Compiled(program)
    tokens = random_tokens(program, LENGTH, torch.Generator().manual_seed(8))
    with threads(2):  # two threads show races; one row at a time has the phases of a single iteration
        yield Family(request.param, made, tokens, made.decode("target", tokens, 1), made.decode("draft", tokens, 1))


def reference(program: Program, entry: str, tokens: list[int]) -> np.ndarray:
    return run(program, program.entries[entry], torch.tensor([tokens]))[0].numpy()
