"""What a caller may say about an answer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TypedDict

from specqd.errors import InputError
from specqd.runtime.asking import Round
from specqd.runtime.sampling import Sampling

__all__ = ["Options", "stop_tokens"]


class Options(TypedDict, total=False):
    """Keyword arguments of `Model.generate` and `Model.stream`, each of which may be left out.

    Attributes:
        speculate: let the levels of the plan draft (default). The tokens are the same either way, unless they are
            sampled with `coupling="rejection"`: then they have the same distribution.
        draft_length: let the first compiled level draft alone, so many tokens a round.
        plan: the levels that draft and their draft lengths (see specqd.runtime.plan), instead of the artifact's.
        raw: continue a text as it is, even if the model can chat.
        sampling: how tokens are chosen; None (default): the most likely one, always.
        stop: strings before which the text ends. The tokens end with the one that completes the first of them.
        eos_token_ids: tokens after which the answer ends, instead of the model's own.
        ignore_eos: end after no token.
        cancel: asked before each round; the answer ends when it returns True.
        on_round: told of each verification.
    """

    speculate: bool
    draft_length: int | None
    plan: str | None
    raw: bool
    sampling: Sampling | None
    stop: Sequence[str]
    eos_token_ids: Collection[int] | None
    ignore_eos: bool
    cancel: Callable[[], bool] | None
    on_round: Callable[[Round], None] | None


def stop_tokens(
    of_model: Iterable[int], given: Collection[int] | None, ignore: bool, vocabulary: int
) -> frozenset[int]:
    """Return the tokens that end an answer: those given, else the model's own.

    Raises:
        InputError: one is not in the vocabulary, or some are given and all are to be ignored.
    """
    if given is None:
        return frozenset() if ignore else frozenset(of_model)
    if ignore:
        raise InputError(
            "give eos_token_ids or ignore_eos, not both: one says where to end, the other nowhere"
        )
    for token in given:
        if not isinstance(token, int) or not 0 <= token < vocabulary:
            raise InputError(f"cannot end after token {token!r}: give ids from 0 to {vocabulary - 1}")
    return frozenset(given)
