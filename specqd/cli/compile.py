"""`specqd compile`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from specqd.artifact import open_artifact
from specqd.build import DEFAULT_CONTEXT
from specqd.cli.app import ModelPath, app, read_named, read_sizes
from specqd.cli.progress import progress_bar
from specqd.errors import InputError
from specqd.tuning import Tuning

__all__ = ["compile_"]


@app.command("compile")
def compile_(
    model: ModelPath,
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="DIR", help="Where the artifact goes.", show_default=False),
    ],
    draft: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=MODEL",
            help="A smaller model with the same tokenizer that drafts too; may be given several times.",
        ),
    ] = None,
    pipeline: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Passes to run instead of the usual ones; see `specqd passes`."),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help=f"Positions (prompt and answer) to hold. (default: the model's, at most {DEFAULT_CONTEXT})",
        ),
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=N", help="Fix a size that an .onnx file leaves open, such as batch=1."),
    ] = None,
    isa: Annotated[
        str, typer.Option(metavar="NAME", help="Instruction set; native is the best this CPU has.")
    ] = "native",
    plan: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="How to speculate, such as 'target <- draft@fixed:3', instead of the usual way.",
        ),
    ] = None,
    tune: Annotated[
        Literal["none", "cached", "full"],
        typer.Option(
            metavar="HOW",
            help="How kernels of a module are cut: none leaves it to specqd, cached takes what was measured before, "
            "full measures more.",
        ),
    ] = "none",
    minutes: Annotated[float, typer.Option(metavar="N", help="Time for --tune full.")] = 5.0,
    tracker: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="A TVM RPC tracker whose machines measure, for --tune full."),
    ] = None,
    known: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="An artifact tuned on such a CPU, whose measurements are taken too."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the artifact that is at DIR.")] = False,
) -> None:
    """Compile a model into an artifact: native code, packed weights, tokenizer.

    The artifact appears at DIR when it is complete, and not at all if anything goes wrong.

    Example: specqd compile HuggingFaceTB/SmolLM2-135M-Instruct -o smollm2.specqd
    """
    from specqd.build import compile_model

    began = time.perf_counter()
    with progress_bar() as tell:
        manifest = compile_model(
            model,
            output,
            dynamic_shapes=read_sizes(size) or None,
            drafts=read_named("--draft", draft, "NAME=MODEL, such as small=./small-model"),
            pipeline=pipeline,
            context=context,
            isa=isa,
            plan=plan,
            tuning=_tuning(tune, minutes, tracker, known),
            force=force,
            progress=tell,
        )
    total = sum(record.size for record in manifest.files.values()) / 1e6
    print(f"compiled {output} for {manifest.isa}: {total:.0f} MB in {time.perf_counter() - began:.0f} s")
    if manifest.module is not None and tune != "none":
        print(f"{len(manifest.module.tuned)} kernels have a schedule that was measured to be faster")
    if manifest.module is None and "tokenizer.json" not in manifest.files:
        print("the model has no tokenizer.json: only Python, with token ids, can prompt the artifact")
    if manifest.refusals:
        count = len(manifest.refusals)
        print(
            f"{count} rewrite{'s were' if count > 1 else ' was'} refused; `specqd inspect {output}` says which and why"
        )


def _tuning(tune: str, minutes: float, tracker: str | None, known: Path | None) -> Tuning | None:
    """Return what the options say; raises InputError where they contradict each other."""
    if tune == "none":
        if tracker or known:
            raise InputError(
                "--tracker and --known are for kernels that are tuned: add --tune full, or --tune cached"
            )
        return None
    module = open_artifact(known).manifest.module if known else None
    if known and module is None:
        raise InputError(f"{known} is an artifact of a language model, which has no tuned kernels")
    return Tuning(minutes if tune == "full" else 0, tracker, known=module.tuned if module else ())
