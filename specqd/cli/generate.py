"""`specqd generate`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from specqd.cli.app import ArtifactDir, Threads, app
from specqd.cli.rounds import printer
from specqd.errors import InputError
from specqd.runtime.generate import Stats
from specqd.runtime.sampling import Sampling

__all__ = ["generate"]


@app.command()
def generate(
    context: typer.Context,
    directory: ArtifactDir,
    prompt: Annotated[
        str,
        typer.Option(
            "-p", "--prompt", metavar="TEXT", help="What to ask; - reads standard input.", show_default=False
        ),
    ],
    new_tokens: Annotated[
        int, typer.Option("-n", "--max-new-tokens", metavar="N", help="Stop after N tokens.")
    ] = 256,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it is, without chat template.")
    ] = False,
    plainly: Annotated[
        bool, typer.Option("--no-speculate", help="Draft nothing; the text is the same either way.")
    ] = False,
    draft_length: Annotated[
        int | None,
        typer.Option(metavar="N", help="Let the draft alone draft, N tokens a round.", show_default=False),
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Levels that draft, such as 'target <- suffix:6@fixed:7 | draft@confidence:0.6'.",
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(metavar="T", help="Sample at this temperature. (default: the likeliest token, always)"),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(metavar="K", help="Sample from the K likeliest tokens only.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(metavar="P", help="Sample from the likeliest tokens that together have P."),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            metavar="P", help="Sample from tokens with a share P of the likeliest one's probability."
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Sample the same answer each time, whatever is drafted.")
    ] = None,
    coupling: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="noise (default), or rejection: keeps more drafts, but a seed repeats an answer no more.",
        ),
    ] = None,
    repetition_penalty: Annotated[
        float, typer.Option(metavar="X", help="Make tokens of the text less likely, above 1.")
    ] = 1.0,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", metavar="TEXT", help="End before this text; may be given several times."),
    ] = None,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain-speculation", help="Show what was drafted in each round, and what became of it."
        ),
    ] = False,
    cache_mb: Annotated[
        float | None,
        typer.Option(
            "--cache-mb",
            metavar="MB",
            help="Let the caches take at most so many megabytes. (default: all of the context)",
            show_default=False,
        ),
    ] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Say afterwards how fast it went.")] = False,
    threads: Threads = None,
) -> None:
    """Answer a prompt, showing the text as it comes. Ctrl-C ends it.

    Each token is the likeliest one unless --temperature is given.

    The artifact's code runs in this process: use only artifacts you trust.

    Example: specqd generate smollm2.specqd -p "What is a prime number?" --stats
    """
    from specqd.runtime.model import load

    text = _text(prompt)
    strings = [_valid(one, "a stop string") for one in stop or ()]
    chosen = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed, "coupling": coupling}
    sampling = _sampling(temperature, repetition_penalty, chosen)
    model = load(directory, threads, cache_mb=cache_mb)
    try:
        pieces = model.stream(
            text,
            new_tokens,
            speculate=not plainly,
            draft_length=draft_length,
            plan=plan,
            raw=raw,
            sampling=sampling,
            stop=strings,
            on_round=printer(model.text) if explain else None,
        )
        # Rounds and text would run into each other on a terminal.
        for piece in ["".join(pieces)] if explain else pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
            if context.obj:
                break
    except KeyboardInterrupt:
        pass
    sys.stdout.write("\n")
    sys.stdout.flush()
    if stats:
        print(_summary(model.last, model.engine.threads), file=sys.stderr)
    if context.obj:
        raise typer.Exit(128 + context.obj[0])


def _text(prompt: str) -> str:
    """Return what to ask; raises InputError where there is nothing, or bytes that are no text."""
    source = "standard input" if prompt == "-" else "the prompt"
    if prompt == "-" and sys.stdin is None:
        raise InputError("standard input is closed: pipe a prompt into it, or give one with `-p TEXT`")
    try:
        text = sys.stdin.read() if prompt == "-" else prompt
    except UnicodeError:
        text = "\udc80"  # as in an argument
    if not _valid(text, source):
        raise InputError(f"{source} is empty: give at least one character")
    return text


def _valid(text: str, source: str) -> str:
    try:
        text.encode()  # Python keeps bytes of an argument that are no text as lone surrogates
    except UnicodeError as error:
        raise InputError(
            f"{source} holds bytes that are not UTF-8: convert it, for example with `iconv -t UTF-8`"
        ) from error
    return text


def _sampling(temperature: float | None, penalty: float, chosen: dict[str, Any]) -> Sampling | None:
    """Return what the options ask for; raises InputError where one would have no effect."""
    given = {name: value for name, value in chosen.items() if value is not None}
    if temperature is None and given:
        name = next(iter(given)).replace("_", "-")
        raise InputError(
            f"--{name} is about sampling, and the likeliest token is chosen: give --temperature too"
        )
    return Sampling(temperature or 0.0, repetition_penalty=penalty, **given)


def _summary(stats: Stats, threads: int) -> str:
    ends = {
        "eos": "the model ended",
        "stop": "a stop string was met",
        "length": "-n was reached",
        "context": "the cache is full",
    }
    lines = [
        f"prompt    {stats.prompt_tokens} tokens, {stats.prefill_tokens_per_s:.0f} tokens/s",
        f"answer    {stats.new_tokens} tokens, {stats.decode_tokens_per_s:.1f} tokens/s, "
        f"up to {threads} threads; {ends.get(stats.finish, 'interrupted')}",
    ]
    if stats.acceptance_rate is not None and stats.tokens_per_verify is not None:
        lines.append(
            f"drafting  {stats.acceptance_rate:.0%} accepted, {stats.tokens_per_verify:.2f} tokens a verify "
            f"pass, {stats.rounds} passes"
        )
    return "\n".join(lines)
