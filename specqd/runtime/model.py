"""`specqd.load(directory)`: an artifact that answers prompts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

from specqd.errors import InputError
from specqd.runtime.batch import Batch, Request
from specqd.runtime.choosing import Greedy
from specqd.runtime.drafting import DraftLength
from specqd.runtime.engine import Engine
from specqd.runtime.generate import Decoding, Stats, decode, demand_prompt
from specqd.runtime.levels import Round
from specqd.runtime.plan import Link, Plan, Rules
from specqd.runtime.text import Message, Text

__all__ = ["Generation", "Model", "Prompt", "load"]

Prompt = str | Sequence[Message] | Sequence[int]
"""Text, a chat as a list of messages, or token ids."""


@dataclass(frozen=True)
class Generation:
    """New tokens (a final end-of-sequence token included), their text, and how it went."""

    tokens: list[int]
    text: str
    stats: Stats


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
        speculate: bool = True,
        draft_length: int | None = None,
        plan: str | None = None,
        raw: bool = False,
        ignore_eos: bool = False,
        on_text: Callable[[str], None] | None = None,
        on_round: Callable[[Round], None] | None = None,
    ) -> Generation:
        """Continue a prompt greedily; `on_text` is called with each new piece of text.

        The tokens are the same whatever `speculate`, `draft_length` and `plan` say. `plan` names the levels and
        their draft lengths (see specqd.runtime.plan), instead of the artifact's own plan; `draft_length` lets the
        first compiled level of that draft alone, so many tokens a round. `on_round` is told of each verification.
        A prompt of token ids needs no tokenizer; its generation then has text only if there is one.

        Raises:
            InputError: the prompt is empty, does not fit the cache, or is refused by the chat template; or the
                plan cannot be followed.
        """
        tokens: list[int] = []
        pieces: list[str] = []
        encoded, chosen = self.encode(prompt, raw=raw), self.plan_of(speculate, draft_length, plan)
        for new, piece in self._with_text(
            self._rounds(encoded, max_new_tokens, chosen, self._stop(ignore_eos), on_round)
        ):
            tokens += new
            pieces.append(piece)
            if on_text and piece:
                on_text(piece)
        return Generation(tokens, "".join(pieces), self.last)

    def generate_many(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int = 256,
        *,
        speculate: bool = True,
        plan: str | None = None,
        raw: bool = False,
        ignore_eos: bool = False,
    ) -> list[Generation]:
        """Continue several prompts, as many at a time as the model was loaded for (`sequences`).

        Each gets the tokens that `generate` would give it.

        Raises:
            InputError: as `generate`, before anything is decoded.
        """
        chosen = self.plan_of(speculate, None, plan)
        encoded = [self.encode(prompt, raw=raw) for prompt in prompts]
        for tokens in encoded:
            demand_prompt(self.engine, tokens, max_new_tokens)
        batch, made = Batch(self.engine), {}
        for tokens in encoded:
            request = self._request(tokens, max_new_tokens, chosen, ignore_eos)
            made[request] = Generation([], "", request.stats)
            batch.add(request)
        while len(batch):
            for request, new in batch.step():
                made[request].tokens.extend(new)
        for request in made:
            if request.error:
                raise request.error
        decode = self.text.decode if self._has_text else lambda tokens: ""
        return [replace(one, text=decode(one.tokens)) for one in made.values()]

    def _request(self, prompt: list[int], limit: int, plan: Plan, ignore_eos: bool) -> Request:
        stop = self._stop(ignore_eos)
        stats = Stats()

        def start(rules: Rules, clock: Callable[[], float]) -> Decoding:
            target = plan.build(self.engine, Greedy(), stop, rules=rules, clock=clock)
            return Decoding(target, prompt, stats, limit, clock)

        return Request(min(len(prompt) + limit, self.engine.capacity), start, stats)

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int = 256,
        *,
        speculate: bool = True,
        draft_length: int | None = None,
        plan: str | None = None,
        raw: bool = False,
        ignore_eos: bool = False,
        on_round: Callable[[Round], None] | None = None,
    ) -> Iterator[str]:
        """Yield the text of `generate` in pieces as it becomes certain; `last` holds the figures."""
        encoded, chosen = self.encode(prompt, raw=raw), self.plan_of(speculate, draft_length, plan)
        rounds = self._rounds(encoded, max_new_tokens, chosen, self._stop(ignore_eos), on_round)
        return (piece for _, piece in self._with_text(rounds) if piece)

    def tokens(
        self,
        prompt: Prompt,
        max_new_tokens: int = 256,
        *,
        plan: str | None = None,
        raw: bool = False,
        eos_token_ids: Collection[int] | None = None,
    ) -> Iterator[list[int]]:
        """Yield the tokens of `generate` as each round makes them certain; closing it ends the answer.

        The answer ends with a token of `eos_token_ids`, by default those of the artifact.
        """
        encoded, chosen = self.encode(prompt, raw=raw), self.plan_of(True, None, plan)
        stop = self._stop() if eos_token_ids is None else frozenset(eos_token_ids)
        return self._rounds(encoded, max_new_tokens, chosen, stop, None)

    def _stop(self, ignore_eos: bool = False) -> frozenset[int]:
        return frozenset() if ignore_eos else frozenset(self.engine.manifest.eos_token_ids)

    def _rounds(
        self,
        prompt: list[int],
        limit: int,
        plan: Plan,
        stop: Collection[int],
        on_round: Callable[[Round], None] | None,
    ) -> Iterator[list[int]]:
        self.last = Stats()
        target = plan.build(self.engine, Greedy(), stop, on_round, self._rules)
        return self._on_a_sequence(partial(decode, target, prompt, self.last, max_new_tokens=limit))

    def _on_a_sequence(self, begin: Callable[..., Iterator[list[int]]]) -> Iterator[list[int]]:
        """Decode on a free sequence of the engine, or on that of the oldest answer left unfinished."""
        tables, answer = self.engine.tables, object()
        if (sequence := tables.take()) is None and self._answers:
            tables.release(self._answers.pop(next(iter(self._answers))))
            sequence = tables.take()
        if sequence is None:
            raise InputError("a batch has taken all sequences: load the artifact with more `sequences`")
        self._answers[answer] = sequence
        try:
            for new in begin(sequence=sequence):
                yield new
                if answer not in self._answers:
                    raise InputError(
                        "another answer was begun in this one's place: load the artifact with more `sequences`, "
                        "or finish one before the next"
                    )
        finally:
            if self._answers.pop(answer, None) is not None:
                tables.release(sequence)

    @cached_property
    def _answers(self) -> dict[object, int]:
        """The sequences on which answers are decoded, the oldest first."""
        return {}

    def _with_text(self, rounds: Iterator[list[int]]) -> Iterator[tuple[list[int], str]]:
        detokenizer = self.text.detokenizer() if self._has_text else None
        for new in rounds:
            yield new, detokenizer.add(new) if detokenizer else ""
        if detokenizer:
            yield [], detokenizer.finish()

    @property
    def _has_text(self) -> bool:
        return (self.engine.artifact.directory / "tokenizer.json").is_file()


def load(
    directory: str | Path,
    threads: int | None = None,
    *,
    sequences: int = 1,
    cache_tokens: int | None = None,
    verify: bool = False,
) -> Model:
    """Load an artifact, which runs its code in this process: load only what you trust.

    `threads` is the most it may use (default: the CPUs of this process); `verify` hashes every file again. So many
    `sequences` can be decoded together (`generate_many`), whose prompts and answers may have `cache_tokens` tokens in
    all (default: the artifact's context each).

    Raises:
        ArtifactError: the artifact is missing, damaged, or made for another CPU.
        InputError: an option is out of range.
    """
    return Model(Engine.open(directory, threads, sequences=sequences, positions=cache_tokens, verify=verify))
