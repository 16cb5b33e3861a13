"""A compiled draft as the `assistant_model` of transformers' assisted generation.

    model.generate(**inputs, assistant_model=Assistant(specqd.load("model.specqd")))

transformers asks little of an assistant: a configuration, and a `generate` that continues the text so far and says
how sure it was of each token. It need be no PreTrainedModel, and without `past_key_values` in its answer nobody
crops a cache of it: this one compares each text with what it has fed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig
from transformers.generation import GenerateDecoderOnlyOutput

from specqd.errors import InputError
from specqd.runtime.engine import Engine
from specqd.runtime.model import Model

__all__ = ["Assistant"]


class Assistant:
    """Proposes, greedily, how `entry` of an artifact goes on (default: the last of its chain, the cheapest draft).

    The target may sample: a proposal's scores say that it was certain, and transformers then accepts it with just the
    probability that the target gives it. The most tokens a round are `generation_config.num_assistant_tokens`; a round
    ends earlier after a token of which `entry` is less sure than `confidence`.

    It takes a sequence of the artifact for itself; load the artifact with two `sequences` to use it otherwise too.

    Raises:
        InputError: the artifact has no such entry, or all its sequences are taken.
    """

    def __init__(self, artifact: Model, entry: str | None = None, confidence: float = 0.4) -> None:
        engine = artifact.engine
        self._engine, self._entry = engine, entry or engine.manifest.chain[-1]
        engine.rows(self._entry)
        self._filler = _filler(engine, self._entry)
        sequence = engine.tables.take()
        if sequence is None:
            raise InputError(
                "an assistant needs a sequence for itself: load the artifact with more `sequences`"
            )
        self._sequence = sequence
        self._fed: list[int] = []
        self.confidence = confidence
        self.device = torch.device("cpu")
        self.config = PreTrainedConfig(vocab_size=engine.manifest.vocab_size)
        # A threshold of transformers' own would be tuned on scores, which say nothing here.
        self.generation_config = GenerationConfig(assistant_confidence_threshold=0.0)

    def _supports_logits_to_keep(self) -> bool:
        return False

    def generate(
        self, input_ids: Tensor, generation_config: GenerationConfig, max_new_tokens: int, **_: Any
    ) -> GenerateDecoderOnlyOutput:
        """Continue int64 `[1, length]` by 1 to `max_new_tokens` tokens.

        The result's `scores` are a float32 `[1, vocabulary]` a token: 0 for it and -inf for all others.
        """
        text = input_ids[0].tolist()
        ends = generation_config.eos_token_id
        stop = frozenset([ends] if isinstance(ends, int) else ends or ())
        new: list[int] = []
        while len(new) < max_new_tokens and self._engine.room(self._entry, len(text) + len(new) - 1):
            token, sure = self._next([*text, *new])
            new.append(token)
            if token in stop or sure < self.confidence:
                break
        if not new:  # The cache is full; transformers cannot do without a proposal.
            new = text[-1:]
        scores = torch.full((len(new), 1, self.config.vocab_size), -torch.inf)
        scores[torch.arange(len(new)), 0, torch.tensor(new)] = 0
        sequences = torch.cat([input_ids, input_ids.new_tensor([new])], 1)
        return GenerateDecoderOnlyOutput(sequences=sequences, scores=tuple(scores))

    def _next(self, text: list[int]) -> tuple[int, float]:
        """Feed what is new in `text`; return the token after it and its probability."""
        fed = min(_agreement(self._fed, text), len(text) - 1)
        fed = self._engine.recent.reached(self._entry, self._sequence, fed)
        if len(text) - fed > self._engine.room(self._entry, fed):
            for rows in reversed(self._engine.rows(self._filler)):
                while len(text) - 1 - fed >= rows:
                    self._engine.feed(self._filler, text[fed : fed + rows], fed, self._sequence)
                    fed += rows
        output = self._engine.feed(self._entry, text[fed:], fed, self._sequence)
        self._fed = text
        last = len(text) - fed - 1
        return output.token(last), output.confidence(last)[0]


def _agreement(a: list[int], b: list[int]) -> int:
    """Return the length of the longest common beginning."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    return next(i for i in range(shorter) if a[i] != b[i])


def _filler(engine: Engine, entry: str) -> str:
    """Return the entry that fills the cache of `entry` in the largest pieces, in one cache with it."""
    caches = engine.manifest.sizes("cache", entry).keys()
    sharing = [name for name in engine.entries if caches <= engine.manifest.sizes("cache", name).keys()]
    return max(sharing, key=lambda name: engine.rows(name)[-1])
