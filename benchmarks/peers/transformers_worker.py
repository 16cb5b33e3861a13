"""transformers, eager, on the checkpoint as it is: `transformers_worker.py THREADS FOLDER DTYPE`."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
import transformers
from protocol import serve


class Eager:
    """A causal language model with transformers' own growing cache."""

    def __init__(self, folder: str, dtype: str) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager"
        ).eval()
        self._cache: Any = None

    @torch.inference_mode()
    def decode(self, model: str, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        """Continue the prompt greedily; there is one model, whatever it is called."""
        prefill_s, token = self._prefill(prompt)
        tokens = [token]
        began = time.perf_counter()
        while len(tokens) < new_tokens:
            tokens.append(self._feed(tokens[-1:]))
        return {"tokens": tokens, "prefill_s": prefill_s, "decode_s": time.perf_counter() - began}

    @torch.inference_mode()
    def prefill(self, model: str, prompt: list[int]) -> dict[str, Any]:
        """Time a prompt alone."""
        return {"seconds": self._prefill(prompt)[0]}

    def _prefill(self, prompt: list[int]) -> tuple[float, int]:
        self._cache = transformers.DynamicCache(config=self.model.config)
        began = time.perf_counter()
        token = self._feed(prompt)
        return time.perf_counter() - began, token

    def _feed(self, tokens: list[int]) -> int:
        output = self.model(
            input_ids=torch.tensor([tokens]), past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        return int(output.logits[0, -1].argmax())


def _start() -> dict[str, Any]:
    threads, folder, dtype = sys.argv[1:]
    torch.set_num_threads(int(threads))
    eager = Eager(folder, dtype)
    parameters = {p.data_ptr(): p.nbytes for p in eager.model.parameters()}
    config = eager.model.config
    kv = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim
    facts = {
        "version": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "weight_bytes": {dtype: sum(parameters.values())},
        "cache_bytes": {dtype: kv * eager.model.dtype.itemsize},
    }
    return {"facts": lambda: facts, "decode": eager.decode, "prefill": eager.prefill}


if __name__ == "__main__":
    serve(_start)
