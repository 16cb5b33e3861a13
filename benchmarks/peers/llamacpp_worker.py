"""llama.cpp through the plain C functions of llama-cpp-python: no sampler, no text, only decode and argmax.

Run by the peers' Python: `llamacpp_worker.py THREADS NAME=FILE.gguf ...`. Asked for `TARGET+DRAFTER` (see
llamacpp_speculation.drafter), it decodes with drafts.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
from llamacpp_speculation import drafter, speculate
from protocol import serve

_CONTEXT = 1024  # positions
_BATCH = 512  # tokens of a prompt that are computed together
_F16 = 2  # bytes an element of llama.cpp's own cache


class Loaded:
    """One GGUF file with a context of its own."""

    def __init__(self, path: str, threads: int) -> None:
        parameters = llama.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self._model = llama.llama_model_load_from_file(path.encode(), parameters)
        options = llama.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = _CONTEXT, _BATCH, _BATCH
        options.n_threads = options.n_threads_batch = threads
        self._context = llama.llama_init_from_model(self._model, options)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self._batch = llama.llama_batch_init(_BATCH, 0, 1)
        self.last = -1  # the token after the latest prompt
        self._vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors; the embedding is the output matrix too, so a step reads all of them."""
        return int(llama.llama_model_size(self._model))

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values a position."""
        heads, kv_heads = llama.llama_model_n_head(self._model), llama.llama_model_n_head_kv(self._model)
        width = llama.llama_model_n_embd(self._model) // heads * kv_heads
        return int(llama.llama_model_n_layer(self._model)) * 2 * width * _F16

    def decode(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        """Continue the prompt greedily."""
        prefill_s, token = self._prefill(prompt)
        tokens = [token]
        began = time.perf_counter()
        while len(tokens) < new_tokens:
            tokens.append(self._feed(tokens[-1:]))
        return {"tokens": tokens, "prefill_s": prefill_s, "decode_s": time.perf_counter() - began}

    def prefill(self, prompt: list[int]) -> dict[str, Any]:
        """Time a prompt alone."""
        seconds, self.last = self._prefill(prompt)
        return {"seconds": seconds}

    def rows(self, tokens: Sequence[int], start: int) -> list[int]:
        """Feed tokens from position `start` in one batch; return the greedy choice after each."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, start + i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        if llama.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")
        return [int(self._logits(i).argmax()) for i in range(len(tokens))]

    def cut(self, length: int) -> None:
        """Forget what stands in the cache from position `length` on."""
        llama.llama_memory_seq_rm(llama.llama_get_memory(self._context), 0, length, -1)

    def sure(self, tokens: Sequence[int], measured: bool) -> tuple[int, float]:
        """Feed tokens; return the greedy choice after them and its probability (1 unless `measured`)."""
        token = self._feed(tokens)
        if not measured:
            return token, 1.0
        logits = self._logits(-1)
        return token, float(1 / np.exp(logits - logits[token]).sum())

    def _prefill(self, prompt: list[int]) -> tuple[float, int]:
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        token = -1
        began = time.perf_counter()
        for at in range(0, len(prompt), _BATCH):
            token = self._feed(prompt[at : at + _BATCH])
        return time.perf_counter() - began, token

    def _feed(self, tokens: Sequence[int]) -> int:
        array = (llama.llama_token * len(tokens))(*tokens)
        if llama.llama_decode(self._context, llama.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama_decode failed")
        return int(self._logits(-1).argmax())

    def _logits(self, row: int) -> np.ndarray:
        logits = llama.llama_get_logits_ith(self._context, row)
        return np.ctypeslib.as_array(logits, (self._vocabulary,))


def _start() -> dict[str, Any]:
    threads = int(sys.argv[1])
    models = {}
    for argument in sys.argv[2:]:
        name, _, path = argument.partition("=")
        models[name] = Loaded(path, threads)
    facts = {
        "version": f"llama-cpp-python {version('llama-cpp-python')}",
        "system": llama.llama_print_system_info().decode().strip(" |"),
        "weight_bytes": {name: model.weight_bytes for name, model in models.items()},
        "cache_bytes": {name: model.cache_bytes for name, model in models.items()},
    }

    def decode(model: str, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        target, _, draft = model.partition("+")
        if not draft:
            return models[target].decode(prompt, new_tokens)
        return speculate(models[target], drafter(draft, models), prompt, new_tokens)

    return {
        "facts": lambda: facts,
        "decode": decode,
        "prefill": lambda model, prompt: models[model].prefill(prompt),
    }


@llama.llama_log_callback
def _say_errors(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    if level >= 4:  # GGML_LOG_LEVEL_ERROR
        os.write(2, text)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    llama.llama_log_set(_say_errors, ctypes.c_void_p(0))
    serve(_start)
