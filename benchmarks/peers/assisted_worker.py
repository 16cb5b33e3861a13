"""transformers' own assisted generation, and generation with a compiled artifact's help.

`assisted_worker.py THREADS FOLDER ARTIFACT [ASSISTANT_FOLDER]`, run by this project's Python.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
import transformers
from protocol import serve
from torch import Tensor

import specqd
from specqd.frontends import Assistant, specqd_generate

_LOOKED_UP = 10  # tokens, as in transformers' documentation


class _Clock:
    """A streamer that notes when the first new tokens came, and how many these were."""

    def __init__(self) -> None:
        self.began, self.first, self.puts = 0.0, 0, 0

    def put(self, tokens: Tensor) -> None:
        self.puts += 1
        if self.puts == 2:  # the first is the prompt
            self.began, self.first = time.perf_counter(), tokens.numel()

    def end(self) -> None:
        pass


class Assisted:
    """A causal language model in BF16, and ways to help it."""

    def __init__(self, threads: int, folder: str, artifact: str, assistant: str | None) -> None:
        torch.set_num_threads(threads)
        self.model = _load(folder)
        compiled = specqd.load(artifact, threads, sequences=2, prefix_sharing=False)
        self.ways: dict[str, dict[str, Any]] = {
            "plain": {},
            "prompt lookup": {"prompt_lookup_num_tokens": _LOOKED_UP},
            "specqd's draft as assistant": {"assistant_model": Assistant(compiled)},
            "specqd as custom_generate": {"custom_generate": specqd_generate(compiled)},
        }
        if assistant is not None:
            self.ways["assistant"] = {"assistant_model": _load(assistant)}

    def decode(self, model: str, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        """Continue the prompt greedily in the way called `model`; the first new tokens count as the prompt's."""
        clock = _Clock()
        made = self.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=new_tokens,
            do_sample=False,
            streamer=clock,
            **self.ways[model],
        )
        seconds = time.perf_counter() - clock.began
        return {"tokens": made[0, len(prompt) :].tolist(), "first": clock.first, "decode_s": seconds}


def _load(folder: str) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    return model


def _start() -> dict[str, Any]:
    threads, folder, artifact, *assistant = sys.argv[1:]
    assisted = Assisted(int(threads), folder, artifact, *(assistant or [None]))
    facts = {
        "version": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "ways": list(assisted.ways),
    }
    return {"facts": lambda: facts, "decode": assisted.decode}


if __name__ == "__main__":
    serve(_start)
