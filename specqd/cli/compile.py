"""`specqd compile`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from specqd.build import DEFAULT_CONTEXT
from specqd.cli.app import ModelPath, app, read_named, read_sizes
from specqd.cli.progress import progress_bar

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
            force=force,
            progress=tell,
        )
    total = sum(record.size for record in manifest.files.values()) / 1e6
    print(f"compiled {output} for {manifest.isa}: {total:.0f} MB in {time.perf_counter() - began:.0f} s")
    if manifest.module is None and "tokenizer.json" not in manifest.files:
        print("the model has no tokenizer.json: only Python, with token ids, can prompt the artifact")
    if manifest.refusals:
        count = len(manifest.refusals)
        print(
            f"{count} rewrite{'s were' if count > 1 else ' was'} refused; `specqd inspect {output}` says which and why"
        )
