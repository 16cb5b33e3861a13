"""llama.cpp decoding with drafts: a second model's, or what prompt lookup finds; greedy, so that the target decides.

The loop is that of llama.cpp's `speculative-simple`: feed the pending token and the drafts in one batch, keep the
longest prefix that the target chooses too, and cut both caches behind it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

if TYPE_CHECKING:
    from llamacpp_worker import Loaded

__all__ = ["drafter", "speculate"]

Drafter = Callable[[list[int]], list[int]]


def speculate(target: Loaded, propose: Drafter, prompt: list[int], new_tokens: int) -> dict[str, Any]:
    """Continue the prompt greedily, verifying what `propose` says of the text so far."""
    text, prefill_s = list(prompt), target.prefill(prompt)["seconds"]
    text.append(target.last)
    propose(text)  # fills the draft's cache, which is the prompt's cost
    passes, began = 0, time.perf_counter()
    while len(text) < len(prompt) + new_tokens:
        room = len(prompt) + new_tokens - len(text)
        drafts = propose(text)[: room - 1]
        chosen = target.rows([text[-1], *drafts], len(text) - 1)
        agreed = next((i for i, draft in enumerate(drafts) if draft != chosen[i]), len(drafts))
        text += chosen[: agreed + 1]
        target.cut(len(text) - 1)
        passes += 1
    seconds = time.perf_counter() - began
    return {"tokens": text[len(prompt) :], "prefill_s": prefill_s, "decode_s": seconds, "passes": passes}


def drafter(spec: str, models: dict[str, Loaded]) -> Drafter:
    """Read `lookup:NGRAM:TOKENS`, or `MODEL:TOKENS:P`: at most so many, ending where the model's choice is below P."""
    name, *numbers = spec.split(":")
    if name == "lookup":
        found = LlamaPromptLookupDecoding(*map(int, numbers))
        return lambda text: found(np.array(text, np.intc)).tolist()
    return _Draft(models[name], int(numbers[0]), float(numbers[1]))


class _Draft:
    def __init__(self, model: Loaded, most: int, least: float) -> None:
        self._model, self._most, self._least = model, most, least
        self._fed: list[int] = []

    def __call__(self, text: list[int]) -> list[int]:
        """Draft after `text`; tokens fed before that are not in it are cut off first."""
        pairs = enumerate(zip(self._fed, text, strict=False))
        kept = next((i for i, (a, b) in pairs if a != b), min(len(self._fed), len(text) - 1))
        kept = min(kept, len(text) - 1)
        self._model.cut(kept)
        drafts, pending = list[int](), text[kept:]
        while len(drafts) < self._most:
            token, sure = self._model.sure(pending, self._least > 0)
            if sure < self._least:
                break
            drafts.append(token)
            pending = [token]
        self._fed = [*text, *drafts[: self._most - 1]] if drafts else list(text)
        return drafts
