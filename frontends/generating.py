"""An artifact inside transformers' own `generate`: it decodes, and transformers prepares and returns.

    model.generate(**inputs, max_new_tokens=100, custom_generate=specqd_generate(specqd.load("model.specqd")))

Only the configuration of `model` is used, so its weights need not be loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from specqd.errors import InputError
from specqd.runtime.model import Model

__all__ = ["specqd_generate"]

_GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "penalty_alpha": None,
    "dola_layers": None,
}
_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
_UNDERSTOOD = {
    "attention_mask",
    "cache_position",
    "logits_to_keep",
    "past_key_values",
    "position_ids",
    "use_cache",
}


def specqd_generate(artifact: Model, plan: str | None = None) -> Callable[..., Any]:
    """Return a `custom_generate` for `generate` of a transformers model whose compiled form is `artifact`.

    It decodes greedily and speculates by `plan` (see specqd.runtime.plan; default: the artifact's own), which changes
    the speed alone. Prompts of a batch are answered one after the other, what the attention mask leaves out aside.
    Length limits, end-of-sequence tokens, a streamer and stopping criteria work as ever; a criterion sees one prompt at
    a time, and no scores. The result is int64 `[batch, length]`, or GenerateDecoderOnlyOutput with it alone.

    The function raises InputError, naming the option, where `generate` is asked for what it cannot give: sampling,
    beams, logits processors, scores, other inputs than tokens, prompts padded on the right, or more tokens than the
    cache holds.
    """

    def generate(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> GenerateDecoderOnlyOutput | Tensor:
        # transformers 5.23 feeds the prompt to a streamer and then drops it where custom_generate is a function.
        streamer = streamer or sys._getframe(1).f_locals.get("streamer")
        _demand_greedy(generation_config, logits_processor, streamer, len(input_ids))
        _demand_same_model(model, artifact)
        prompts = list(_prompts(input_ids, model_kwargs))
        limit = _limit(stopping_criteria, generation_config, prompts, input_ids.shape[1], artifact)
        stop = _Stop(stopping_criteria)
        answers = []
        for row, prompt in zip(input_ids, prompts, strict=True):
            rounds = artifact.tokens(prompt, limit, plan=plan, eos_token_ids=stop.tokens)
            new: list[int] = []
            for certain in stop.cut(row, rounds):
                new += certain
                if streamer is not None:
                    streamer.put(torch.tensor([certain]))
            answers.append(new)
        if streamer is not None:
            streamer.end()
        sequences = torch.cat([input_ids, _padded(answers, generation_config).to(input_ids.device)], 1)
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=sequences)
        return sequences

    return generate


class _Stop:
    """What ends an answer besides its length."""

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        ends = (one.eos_token_id for one in criteria if type(one) is EosTokenCriteria)
        self.tokens = frozenset(token for one in ends for token in one.flatten().tolist())
        self._others = StoppingCriteriaList(
            one for one in criteria if type(one) not in {EosTokenCriteria, MaxLengthCriteria}
        )

    def cut(self, row: Tensor, rounds: Iterator[list[int]]) -> Iterator[list[int]]:
        """Pass `rounds` on, ending with the first token at which a criterion is met."""
        if not self._others:
            yield from rounds
            return
        text = row[None]
        for new in rounds:
            for count, token in enumerate(new, 1):
                text = torch.cat([text, text.new_tensor([[token]])], 1)
                if self._others(text, None).any():
                    yield new[:count]
                    return
            yield new


def _demand_greedy(
    config: GenerationConfig, processors: LogitsProcessorList, streamer: BaseStreamer | None, batch: int
) -> None:
    asked = [
        f"{name}={value}"
        for name, usual in _GREEDY.items()
        if (value := getattr(config, name, None)) not in (None, usual)
    ]
    asked += [type(one).__name__ for one in processors]
    if config.return_dict_in_generate:
        asked += [f"{name}=True" for name in _OUTPUTS if getattr(config, name, None)]
    if asked:
        raise InputError(
            f"a compiled model answers generate greedily and with tokens only, so leave out {', '.join(asked)}"
        )
    if streamer is not None and batch > 1:
        raise InputError(f"a streamer takes one prompt, not {batch}: generate from each in turn")


def _demand_same_model(model: PreTrainedModel, artifact: Model) -> None:
    of_model, compiled = model.config.get_text_config().vocab_size, artifact.engine.manifest.vocab_size
    if of_model != compiled:
        raise InputError(
            f"the artifact was compiled from another model: its vocabulary has {compiled} tokens, that of "
            f"{type(model).__name__} {of_model}"
        )


def _prompts(input_ids: Tensor, inputs: dict[str, Any]) -> Iterator[list[int]]:
    """Yield the tokens of each row that the attention mask leaves."""
    others = [name for name, value in inputs.items() if value is not None and name not in _UNDERSTOOD]
    if others:
        raise InputError(f"a compiled model takes tokens only, so leave out {', '.join(others)}")
    cache = inputs.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        raise InputError("a compiled model has a cache of its own, so leave out past_key_values")
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    kept = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
    if kept.shape != input_ids.shape or not kept[:, -1].all():
        raise InputError(
            "attention_mask leaves out the end of a prompt: pad on the left (padding_side='left')"
        )
    for i, row in enumerate(input_ids):
        prompt = row[kept[i]].tolist()
        if positions is not None and positions[i % len(positions)][kept[i]].tolist() != [*range(len(prompt))]:
            raise InputError(
                "a compiled model counts positions from 0 without gaps, so leave out position_ids"
            )
        yield prompt


def _limit(
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    prompts: list[list[int]],
    width: int,
    artifact: Model,
) -> int:
    """Return the most new tokens, which the cache has room for."""
    lengths = [one.max_length for one in criteria if type(one) is MaxLengthCriteria]
    limit = min(lengths or [config.max_length]) - width
    longest, capacity = max(map(len, prompts)), artifact.engine.capacity
    if longest + limit > capacity + 1:  # the last token need not be in the cache
        raise InputError(
            f"a prompt of {longest} tokens and {limit} new ones do not fit the cache of {capacity}: compile with "
            f"`--context {longest + limit}`, or ask for fewer"
        )
    return limit


def _padded(answers: list[list[int]], config: GenerationConfig) -> Tensor:
    """Return int64 `[batch, longest]`."""
    longest = max(map(len, answers))
    padding = config.pad_token_id
    if padding is None and isinstance(config.eos_token_id, (int, list)):
        padding = torch.tensor(config.eos_token_id).flatten()[0].item()
    if padding is None and any(len(one) < longest for one in answers):
        raise InputError("the answers differ in length and there is no token to pad with: give pad_token_id")
    return torch.tensor([[*one, *[padding] * (longest - len(one))] for one in answers])
