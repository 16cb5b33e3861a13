"""`specqd.load(directory)`: an artifact that answers prompts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Unpack

from specqd.errors import InputError
from specqd.runtime.answer import Answer
from specqd.runtime.choosing import chooser
from specqd.runtime.drafting import DraftLength
from specqd.runtime.engine import Engine
from specqd.runtime.generate import Stats, decode
from specqd.runtime.levels import Round
from specqd.runtime.logprobs import Scored, TokenScore
from specqd.runtime.options import Options, stop_tokens
from specqd.runtime.plan import Link, Plan
from specqd.runtime.sampling import Sampling
from specqd.runtime.stopping import StopStrings
from specqd.runtime.text import Message, Text

__all__ = ["Generation", "Model", "Prompt", "load"]

Prompt = str | Sequence[Message] | Sequence[int]
"""Text, a chat as a list of messages, or token ids."""


@dataclass(frozen=True)
class Generation:
    """New tokens (a final end-of-sequence token included), their text, how it went, and their scores if asked for."""

    tokens: list[int]
    text: str
    stats: Stats
    logprobs: list[TokenScore] | None = None


@dataclass
class Model:
    """A loaded artifact. One sequence at a time: it holds one set of caches."""

    engine: Engine
    last: Stats = field(default_factory=Stats)  # of the latest generation, also of one that was broken off

    @cached_property
    def _rules(self) -> dict[tuple[int, Link], DraftLength]:
        """Draft-length rules, which keep what they learn from one generation to the next."""
        return {}

    @cached_property
    def plan(self) -> Plan:
        """How to speculate unless the caller says otherwise."""
        return Plan.parse(self.engine.manifest.plan)

    def plan_of(self, speculate: bool, draft_length: int | None, plan: str | None) -> Plan:
        """Return the plan that these options of `generate` ask for.

        Raises:
            InputError: they exclude each other, or the plan is none.
        """
        if draft_length is not None and draft_length < 1:
            raise InputError(f"cannot draft {draft_length} tokens: give 1 or more, or do not speculate")
        if plan is not None and draft_length is not None:
            raise InputError("give a plan or a draft length, not both: a plan says `draft@fixed:N`")
        if not speculate:
            return Plan(self.plan.target)
        if plan is not None:
            return Plan.parse(plan)
        if draft_length is None or not self.plan.levels:
            return self.plan
        compiled = [link for link in self.plan.levels[0] if not link.searches] or self.plan.levels[0]
        return Plan(self.plan.target, ((replace(compiled[-1], rule=f"fixed:{draft_length}"),),))

    @cached_property
    def text(self) -> Text:
        """The tokenizer and chat template; raises ArtifactError if the artifact has none."""
        return Text(self.engine.artifact.directory, self.engine.manifest.vocab_size)

    def encode(self, prompt: Prompt, *, raw: bool = False) -> list[int]:
        """Turn a prompt into tokens; text becomes a user's message if the model can chat, unless `raw`.

        Raises:
            InputError: the chat template refuses the messages, or a list mixes messages and tokens.
        """
        if isinstance(prompt, str):
            if raw or self.text.chat_template is None:
                return self.text.encode(prompt)
            return self.text.encode_chat([{"role": "user", "content": prompt}])
        messages = [item for item in prompt if not isinstance(item, int)]
        if not messages:
            return [item for item in prompt if isinstance(item, int)]
        if len(messages) < len(prompt) or not all(hasattr(item, "keys") for item in messages):
            raise InputError("a prompt is a text, a list of messages or a list of token ids, not a mixture")
        return self.text.encode_chat(messages)

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int = 256,
        *,
        logprobs: int = 0,
        on_text: Callable[[str], None] | None = None,
        **options: Unpack[Options],
    ) -> Generation:
        """Continue a prompt; `on_text` is called with each new piece of text, `options` are those of `Options`.

        `logprobs`: how many of the most likely tokens to score in place of each new one; 0 scores none. A prompt of
        token ids needs no tokenizer; its generation then has text only if there is one.

        Raises:
            InputError: the prompt is empty, does not fit the cache, or is refused by the chat template; the plan
                cannot be followed; or an option is out of its range.
        """
        answer, rounds = self._begin(prompt, max_new_tokens, logprobs, **options)
        pieces: list[str] = []
        for piece in answer.pieces(rounds):
            pieces.append(piece)
            if on_text:
                on_text(piece)
        return Generation(answer.tokens, "".join(pieces), self.last, answer.scores if logprobs else None)

    def stream(
        self, prompt: Prompt, max_new_tokens: int = 256, **options: Unpack[Options]
    ) -> Generator[str, None, None]:
        """Yield the text of `generate` in pieces as it becomes certain; `last` holds the figures.

        Closing it ends the answer.
        """
        answer, rounds = self._begin(prompt, max_new_tokens, 0, **options)
        return answer.pieces(rounds)

    def _begin(
        self,
        prompt: Prompt,
        limit: int,
        logprobs: int,
        *,
        speculate: bool = True,
        draft_length: int | None = None,
        plan: str | None = None,
        raw: bool = False,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        eos_token_ids: Collection[int] | None = None,
        ignore_eos: bool = False,
        cancel: Callable[[], bool] | None = None,
        on_round: Callable[[Round], None] | None = None,
    ) -> tuple[Answer, Iterator[list[int]]]:
        """Return an empty answer and the rounds that will fill it."""
        encoded, chosen = self.encode(prompt, raw=raw), self.plan_of(speculate, draft_length, plan)
        manifest = self.engine.manifest
        ends = stop_tokens(manifest.eos_token_ids, eos_token_ids, ignore_eos, manifest.vocab_size)
        strings = StopStrings(stop)
        if strings and not self._has_text:
            raise InputError(
                "the artifact has no tokenizer, so its text cannot be stopped at: give eos_token_ids instead"
            )
        target = chosen.build(self.engine, chooser(sampling), ends, on_round, self._rules)
        scored = Scored(target.chooser, logprobs) if logprobs else None
        target.chooser = scored or target.chooser
        self.last = Stats()
        detokenizer = self.text.detokenizer() if self._has_text else None
        answer = Answer(self.last, detokenizer, strings, scored, cancel)
        return answer, decode(target, encoded, self.last, max_new_tokens=limit)

    @property
    def _has_text(self) -> bool:
        return (self.engine.artifact.directory / "tokenizer.json").is_file()


def load(directory: str | Path, threads: int | None = None, *, verify: bool = False) -> Model:
    """Load an artifact, which runs its code in this process: load only what you trust.

    `threads` is the most it may use (default: the CPUs of this process); `verify` hashes every file again.

    Raises:
        ArtifactError: the artifact is missing, damaged, or made for another CPU.
    """
    return Model(Engine.open(directory, threads, verify=verify))
