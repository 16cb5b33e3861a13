"""llama.cpp through the plain C functions of llama-cpp-python: no sampler, no text, only decode and argmax.

Run by the peers' Python: `llamacpp_worker.py THREADS NAME=FILE.gguf ...`.
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
        return {"seconds": self._prefill(prompt)[0]}

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
        logits = llama.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())


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
    return {
        "facts": lambda: facts,
        "decode": lambda model, prompt, new_tokens: models[model].decode(prompt, new_tokens),
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
