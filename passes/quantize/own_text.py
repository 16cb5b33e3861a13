"""Text that a model writes itself: several texts at once, sampled, a token of each in every pass."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specqd.errors import InputError
from specqd.passes.contract import Progress
from specqd.passes.match import calls
from specqd.program import ModelInfo, Program
from specqd.reference import Interpreter, inputs, new_caches

from .calibration_text import piece, tokenizer

__all__ = ["QUESTIONS", "write"]

ops = torch.ops.specqd

QUESTIONS = (
    "Why do cats purr, and what does it tell us about how they feel?",
    "Write a short email that invites three colleagues to lunch on Friday.",
    "How do I calculate the area of a triangle when I know its three sides?",
    "Write a Python function that counts how often each word occurs in a text file.",
    "Tell me about the history of the bicycle.",
    "I feel nervous before exams. What could help me?",
    "Write a fairy tale about a baker who makes bread that can sing.",
    "What is inflation, and who gains and who loses from it?",
    "Give me a plan for a week of simple dinners without meat.",
    "Explain how a refrigerator keeps food cold.",
    "Translate 'Where is the railway station?' into French, Spanish and German, and explain the words.",
    "What should a good conclusion of an essay contain? Give an example.",
)
"""Asked of a model that can chat; none of them is a prompt of the benchmark."""

_TEMPERATURE = 0.8  # below 1 the text stays sensible; greedy text of small models repeats itself


def write(program: Program, tokens: int, seed: int) -> Generator[Progress, None, list[list[int]]]:
    """Let the target write texts of `tokens` tokens in all, or a few more, prompts included.

    1. A model with a chat template answers QUESTIONS, in turn. Any other begins with its EOS token, after which a
       base model starts a new text, else with BOS, else with a random token.
    2. Twelve texts grow at once, as rows of one pass that meet in attention only. One that ends with EOS, or is as
       long as a text may be, makes room for the next.
    3. Tokens are sampled at a temperature of 0.8, with caches in float32. The same seed on the same machine gives
       the same text.

    Raises:
        InputError: the target has no cache, or gives logits that are no numbers.
        ArtifactError: the tokenizer cannot be read.
    """
    if any(calls(node, ops.causal_attention) for node in program.target.graph.nodes):
        raise InputError(
            "the target needs a cache to write a text; put insert-kv-cache first, or give text=FILE to calibrate on"
        )
    generator = torch.Generator().manual_seed(seed)
    begins = _beginnings(program.model, generator)
    model = _Rows(program, len(QUESTIONS), piece(program.model))
    growing, done = [_Text(next(begins)) for _ in range(model.rows)], []
    for total in range(0, tokens, model.rows):
        yield Progress("writing a text to calibrate on", total, tokens)
        logits = model.step([text.tokens[text.fed] for text in growing], [text.fed for text in growing])
        chances = torch.softmax(logits / _TEMPERATURE, -1)
        if not chances.isfinite().all():
            raise InputError(
                "the target's logits hold NaN or infinity, so it cannot write a text; check the checkpoint, or give "
                "text=FILE to calibrate on"
            )
        sampled = torch.multinomial(chances, 1, generator=generator)
        for row, token in enumerate(sampled[:, 0].tolist()):
            ends = growing[row].take(token) in program.model.eos_token_ids
            if ends or len(growing[row].tokens) >= model.length:
                done.append(growing[row])
                growing[row] = _Text(next(begins))
    texts = [text.tokens[: text.fed + 1] for text in (*done, *growing)]
    return [text for text in texts if len(text) > 1]


def _beginnings(model: ModelInfo, generator: torch.Generator) -> Iterator[list[int]]:
    text = tokenizer(model)
    if text is not None and text.chat_template is not None:
        chats = [text.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS]
        most = piece(model) // 2
        yield from itertools.cycle(chat[:most] for chat in chats)
    known = (*model.eos_token_ids[:1], model.bos_token_id)
    start = next((token for token in known if token is not None), None)
    while True:
        drawn = int(torch.randint(model.vocab_size, (), generator=generator))
        yield [drawn if start is None else start]


@dataclass
class _Text:
    """A text that grows; `fed` of its tokens went through the model."""

    tokens: list[int]
    fed: int = 0

    def take(self, sampled: int) -> int | None:
        """Go a token further; return the sampled token if it becomes part of the text, after the prompt."""
        self.fed += 1
        if self.fed < len(self.tokens):
            return None
        self.tokens.append(sampled)
        return sampled


class _Rows(Interpreter):
    """Runs the target on a token of each of several texts: a text has a row, and caches of its own."""

    def __init__(self, program: Program, rows: int, length: int) -> None:
        super().__init__(program, program.target)
        self.rows, self.length, self.entry = rows, length, program.target
        self.weights = {name: program.weights[name].float() for name in program.used_weights(self.entry.name)}
        small = program.copy()
        small.caches = {
            name: dataclasses.replace(cache, capacity=length, key_dtype="float32", value_dtype="float32")
            for name, cache in program.caches.items()
        }
        self.caches = {
            name: torch.zeros(rows, *cache.shape, dtype=cache.dtype)
            for name, cache in new_caches(small).items()
        }

    def step(self, tokens: list[int], positions: list[int]) -> Tensor:
        """Return float32 logits [rows, vocab] after a token at a position of each text."""
        given = inputs(self.entry, torch.tensor([tokens]), torch.tensor([positions]), self.caches)
        with torch.no_grad():
            return self.run(*given)[0]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call an operator; attention once for each text, on its caches."""
        if target is not ops.cached_attention.default:
            return super().call_function(target, args, kwargs)
        q, k, v, keys, values, positions, *rest = args
        return torch.cat(
            [
                target(
                    *(x[:, :, row, None] for x in (q, k, v)),
                    keys[row],
                    values[row],
                    positions[:, row, None],
                    *rest,
                )
                for row in range(self.rows)
            ],
            1,
        )
