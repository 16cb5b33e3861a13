"""`specqd.load(directory)`: an artifact that answers prompts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Unpack

from specqd.errors import InputError
from specqd.runtime.answer import Answer
from specqd.runtime.asking import Round, run
from specqd.runtime.batch import Batch
from specqd.runtime.choosing import chooser
from specqd.runtime.engine import Engine
from specqd.runtime.generate import Stats, demand_prompt
from specqd.runtime.logprobs import Scored, TokenScore
from specqd.runtime.options import Options, stop_tokens
from specqd.runtime.plan import Plan, Rules
from specqd.runtime.request import Request
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
    """A loaded artifact, with caches for as many sequences as it was loaded for."""

    engine: Engine
    last: Stats = field(default_factory=Stats)  # of the latest generation, also of one that was broken off

    @cached_property
    def _rules(self) -> Rules:
        """Draft-length rules, which keep what they learn from one generation to the next."""
        return {}

    @cached_property
    def _batch_rules(self) -> Rules:
        """The same of sequences that are decoded together."""
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
        request = self.request(prompt, max_new_tokens, logprobs, **options)
        pieces: list[str] = []
        for piece in self._pieces(request):
            pieces.append(piece)
            if on_text:
                on_text(piece)
        return _generation(request, "".join(pieces))

    def stream(
        self, prompt: Prompt, max_new_tokens: int = 256, **options: Unpack[Options]
    ) -> Generator[str, None, None]:
        """Yield the text of `generate` in pieces as it becomes certain; `last` holds the figures.

        Closing it ends the answer.
        """
        return self._pieces(self.request(prompt, max_new_tokens, **options))

    def tokens(
        self, prompt: Prompt, max_new_tokens: int = 256, **options: Unpack[Options]
    ) -> Iterator[list[int]]:
        """Yield the tokens of `generate` as each round makes them certain; `last` holds the figures.

        Closing it ends the answer. `stop` and `cancel`, which act on the text, are not looked at.
        """
        request = self.request(prompt, max_new_tokens, **options)
        self.last = request.answer.stats
        return self._rounds(request)

    def generate_many(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int = 256,
        *,
        logprobs: int = 0,
        **options: Unpack[Options],
    ) -> list[Generation]:
        """Continue several prompts, as many at a time as the model was loaded for (`sequences`).

        Each gets the tokens that `generate` would give it.

        Raises:
            InputError: as `generate`, before anything is decoded.
        """
        requests = [self.request(prompt, max_new_tokens, logprobs, **options) for prompt in prompts]
        for request in requests:
            demand_prompt(self.engine, request.prompt, max_new_tokens)
        batch, texts = Batch(self.engine, self._batch_rules), dict.fromkeys(requests, "")
        for request in requests:
            batch.add(request)
        while len(batch):
            for request, new in batch.step():
                texts[request] += request.answer.add(new)
                if request.answer.over:
                    batch.cancel(request)
        for request in requests:
            if request.error:
                raise request.error
        return [_generation(request, text + request.answer.finish()) for request, text in texts.items()]

    def request(
        self,
        prompt: Prompt,
        max_new_tokens: int = 256,
        logprobs: int = 0,
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
    ) -> Request:
        """Make a prompt ready to be answered, by `Batch.add` for example; the arguments are those of `generate`."""
        manifest = self.engine.manifest
        ends = stop_tokens(manifest.eos_token_ids, eos_token_ids, ignore_eos, manifest.vocab_size)
        strings = StopStrings(stop)
        if strings and not self._has_text:
            raise InputError(
                "the artifact has no tokenizer, so its text cannot be stopped at: give eos_token_ids instead"
            )
        choosing = chooser(sampling)
        scored = Scored(choosing, logprobs) if logprobs else None
        detokenizer = self.text.detokenizer() if self._has_text else None
        return Request(
            self.encode(prompt, raw=raw),
            max_new_tokens,
            self.plan_of(speculate, draft_length, plan),
            choosing,
            Answer(Stats(), detokenizer, strings, scored, cancel),
            ends,
            on_round,
        )

    def _pieces(self, request: Request) -> Generator[str, None, None]:
        self.last = request.answer.stats
        return request.answer.pieces(self._rounds(request))

    def _rounds(self, request: Request) -> Iterator[list[int]]:
        """Decode on a free sequence of the engine, or on that of the oldest answer left unfinished."""
        tables = self.engine.tables
        if (sequence := tables.take()) is None and self._answers:
            tables.release(self._answers.pop(next(iter(self._answers))))
            sequence = tables.take()
        if sequence is None:
            raise InputError("a batch has taken all sequences: load the artifact with more `sequences`")
        self._answers[request] = sequence
        decoding = None
        try:
            decoding = request.begin(self.engine, self._rules)
            if not decoding.enter(sequence, self.engine.slots(len(request.prompt))):
                raise tables.full()
            while not decoding.stats.finish:
                yield run(self.engine, decoding.advance(), sequence)
                if request not in self._answers:
                    raise InputError(
                        "another answer was begun in this one's place: load the artifact with more `sequences`, "
                        "or finish one before the next"
                    )
        finally:
            if self._answers.pop(request, None) is not None:
                if decoding is not None:
                    decoding.leave()
                tables.release(sequence)

    @cached_property
    def _answers(self) -> dict[Request, int]:
        """The sequences on which answers are decoded, the oldest first."""
        return {}

    @property
    def _has_text(self) -> bool:
        return (self.engine.artifact.directory / "tokenizer.json").is_file()


def _generation(request: Request, text: str) -> Generation:
    answer = request.answer
    return Generation(answer.tokens, text, answer.stats, answer.scores if answer.scored else None)


def load(
    directory: str | Path,
    threads: int | None = None,
    *,
    sequences: int = 1,
    cache_tokens: int | None = None,
    cache_mb: float | None = None,
    prefix_sharing: bool = True,
    verify: bool = False,
) -> Model:
    """Load an artifact, which runs its code in this process: load only what you trust.

    `threads` is the most it may use (default: the CPUs of this process); `verify` hashes every file again. So many
    `sequences` can be decoded together (`generate_many`), whose prompts and answers may have `cache_tokens` tokens in
    all, or what fits into `cache_mb` megabytes (default: the artifact's context each). With `prefix_sharing`, a prompt
    that begins as an earlier one or its answer did is fed from where they part; the tokens are the same either way.

    Raises:
        ArtifactError: the artifact is missing, damaged, or made for another CPU.
        InputError: an option is out of range.
    """
    engine = Engine.open(
        directory,
        threads,
        sequences=sequences,
        positions=cache_tokens,
        cache_mb=cache_mb,
        prefix_sharing=prefix_sharing,
        verify=verify,
    )
    return Model(engine)
