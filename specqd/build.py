"""The compile driver: capture, passes, codegen, artifact."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specqd.artifact import Function, Manifest, Refused, is_artifact, save
from specqd.errors import ArtifactError, InputError
from specqd.manifest import OBSERVER, CacheRecord, LevelRecord
from specqd.runtime.cpu import cpu_features
from specqd.runtime.plan import SEARCH, Plan
from specqd.staging import demand_free

if TYPE_CHECKING:
    from specqd.codegen.isa import ISA
    from specqd.passes import Pipeline
    from specqd.program import KVCache, Program
    from specqd.tuning import Tuning

__all__ = ["DEFAULT_CONTEXT", "compile_model", "default_pipeline"]

DEFAULT_CONTEXT = 4096

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and of how much; 0 of 0 when that cannot be known."""


def default_pipeline(context: int | None = None, drafts: Sequence[str] = ()) -> str:
    """Return the passes of a BF16 target with an MXFP4 draft of itself over the target's own cache.

    `drafts` are entries joined from other checkpoints, which are cast to MXFP4 too.
    """
    prepare = (
        "conv1d-to-linear, fuse-rms-norm, fuse-rope, fuse-linear, "
        f"insert-kv-cache{{capacity={context or DEFAULT_CONTEXT}}}, derive-draft"
    )
    cast = (f"{name}: refine-head, {name}: cast-mxfp4{{scale=search}}" for name in ("draft", *drafts))
    return ", ".join([prepare, *cast, "draft: share-kv"])


def compile_model(
    source: str | Path | Any,
    target: str | Path,
    *,
    example_inputs: tuple[Any, ...] | None = None,
    dynamic_shapes: Any = None,
    drafts: Mapping[str, Any] | None = None,
    pipeline: str | None = None,
    context: int | None = None,
    isa: str = "native",
    plan: str | None = None,
    tuning: Tuning | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Compile a model into the artifact directory `target`, which appears whole or not at all.

    `source`, `example_inputs` and `dynamic_shapes` are what `specqd.capture` takes, or `source` is a Program; a module
    that is no language model has neither `drafts` nor `context` nor `plan`; `drafts` are smaller models with the
    same tokenizer by the name that their entry gets, given alike; `context` the most positions (prompt and answer)
    that the caches hold; `isa` a name of codegen's table; `tuning` measures schedules of a module's kernels, or takes
    those that were measured; `force` lets an existing artifact be replaced.

    Raises:
        InputError: an option cannot be used, or `target` is taken.
        CaptureError: the checkpoint cannot be read or captured.
        ContractError: a pass refuses the program.
        CodegenError: the program cannot be compiled.
        ArtifactError: the disk is full.
    """
    target = Path(target)
    demand_free(target, is_artifact if force else None)
    _demand_names(drafts or {}, pipeline)
    parsed = None if plan is None else Plan.parse(plan)
    if context is not None and (pipeline is not None or context < 1):
        raise InputError(
            f"the context of {context} cannot be used: give 1 or more, and with a pipeline of your own say "
            f"it there, as insert-kv-cache{{capacity={max(context, 1)}}}"
        )
    instructions, steps = _understood(isa, pipeline)
    tell = progress or (lambda what, done, of: None)
    try:
        tell("capturing the model", 0, 0)
        program = _captured(source, example_inputs, dynamic_shapes)
        if program.target.of_language_model:
            if tuning is not None:
                raise InputError(
                    f"{program.model.source} is a language model, whose kernels read weights as fast as memory gives "
                    "them: there is no schedule to tune; `specqd tune` chooses how an artifact of it speculates"
                )
            return _compile(program, target, drafts or {}, steps, context, instructions, parsed, force, tell)
        return _compile_module(
            program,
            target,
            steps,
            instructions,
            force,
            tell,
            tuning,
            drafts=drafts,
            context=context,
            plan=plan,
        )
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        raise ArtifactError(
            f"the disk is full ({error.filename or 'a temporary file'}): make room, or set TMPDIR; "
            f"nothing was left at {target}"
        ) from error


def _understood(isa: str, pipeline: str | None) -> tuple[ISA, Pipeline | None]:
    """Return what the words stand for, before minutes are spent on the model."""
    from specqd.codegen.isa import named
    from specqd.passes import Pipeline

    return named(isa, cpu_features()), None if pipeline is None else Pipeline.parse(pipeline)


def _compile_module(
    program: Program,
    target: Path,
    steps: Pipeline | None,
    isa: ISA,
    force: bool,
    tell: Progress,
    tuning: Tuning | None,
    **others: Any,
) -> Manifest:
    from specqd.build_module import compile_module

    given = next((name for name, value in others.items() if value), None)
    if given is not None:
        raise InputError(f"{program.model.source} is no language model, which alone has the option {given!r}")
    cache = _library_cache()
    return compile_module(
        program, target, isa, steps=steps, force=force, tell=tell, cache=cache, tuning=tuning
    )


def _compile(
    program: Program,
    target: Path,
    drafts: Mapping[str, Any],
    steps: Pipeline | None,
    context: int | None,
    isa: ISA,
    plan: Plan | None,
    force: bool,
    tell: Progress,
) -> Manifest:
    from specqd.codegen.library import build
    from specqd.passes import Pipeline
    from specqd.passes.speculate.join import join

    for name, draft in drafts.items():
        tell(f"capturing the draft {name}", 0, 0)
        program = join(program, _captured(draft), name)
    if steps is None:
        steps = Pipeline.parse(default_pipeline(_fitting(context, program), tuple(drafts)))
    tell("rewriting the graph", 0, 0)
    done = 0

    def watch(_: Any) -> None:
        nonlocal done
        done += 1
        tell("rewriting the graph", min(done, len(steps.steps)), len(steps.steps))

    program = steps(program, watch, tell=tell)
    plan = plan or Plan.usual(_usual_chain(program))
    plan.demand(program.chain)
    compiled = build(program, isa, progress=tell, cache=_library_cache())
    written, total = 0, sum(_distinct_weights(compiled.functions).values())

    def wrote(count: int) -> None:
        nonlocal written
        written += count
        tell("writing the weights", min(written, total), total)

    return save(
        target,
        compiled,
        _facts(program, str(steps), plan),
        tokenizer_files=[Path(file) for file in program.model.tokenizer_files],
        graphs={name: str(entry.graph) + "\n" for name, entry in program.entries.items()},
        force=force,
        progress=wrote,
    )


def _demand_names(drafts: Mapping[str, Any], pipeline: str | None) -> None:
    """Refuse names that plans cannot say, or that mean something else there."""
    taken = {
        "target": "the model itself",
        SEARCH: "a search of the text",
        OBSERVER: "what tells select-kv where the model looks",
    }
    if pipeline is None:
        taken["draft"] = "the model's own copy in MXFP4"
    for name in drafts:
        if not (name.isascii() and name.isidentifier()):
            raise InputError(
                f"{name!r} cannot name a draft: use letters, digits and _, and begin with a letter"
            )
        if name in taken:
            raise InputError(f"{name!r} cannot name a draft, for it means {taken[name]}: choose another name")


def _usual_chain(program: Program) -> list[str]:
    """Return the target, then what is no copy of it, in the order of the chain, and its last copy."""
    target, *drafts = program.chain
    copies = [name for name in drafts if program.entry(name).derived_from == target]
    return [target, *(name for name in drafts if name not in copies), *copies[-1:]]


def _library_cache() -> Path | None:
    """Return where compiled libraries are kept; None where nothing can be, which only costs time."""
    from specqd.verified import cache_directory

    folder = cache_directory() / "lib"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


def _captured(source: Any, example_inputs: Any = None, dynamic_shapes: Any = None) -> Program:
    from specqd.frontends.dispatch import capture
    from specqd.program import Program

    return source if isinstance(source, Program) else capture(source, example_inputs, dynamic_shapes)


def _fitting(context: int | None, program: Program) -> int:
    most = program.model.max_positions
    if context is not None and context > most:
        raise InputError(
            f"the model knows {most} positions, fewer than `--context {context}`: ask for at most that"
        )
    return context or min(DEFAULT_CONTEXT, most)


def _facts(program: Program, pipeline: str, plan: Plan) -> dict[str, Any]:
    model = program.model
    return {
        "family": model.family,
        "source": model.source,
        "pipeline": pipeline,
        "chain": program.chain,
        "capacity": min(cache.capacity for cache in _caches(program, program.chain[0])),
        "vocab_size": model.vocab_size,
        "eos_token_ids": model.eos_token_ids,
        "bos_token_id": model.bos_token_id,
        "plan": str(plan),
        "max_positions": model.max_positions,
        "caches": {
            c.name: CacheRecord(
                layers=c.layers,
                kv_heads=c.kv_heads,
                first_plane=program.first_plane(c.name),
                key_dtype=c.key_dtype,
                value_dtype=c.value_dtype,
                recent=c.recent,
            )
            for c in program.caches.values()
        },
        "selection": program.selection,
        "levels": {name: _level(program, name) for name in program.chain},
        "refusals": tuple(
            Refused(step=event.step, entry=event.entry, node=node, why=why)
            for event in program.history
            for node, why in event.refused
        ),
    }


def _level(program: Program, name: str) -> LevelRecord:
    capacity = min(cache.capacity for cache in _caches(program, name))
    entry = program.entry(name)
    return LevelRecord(
        capacity=capacity,
        vocab_size=entry.vocab_size or program.model.vocab_size,
    )


def _caches(program: Program, name: str) -> list[KVCache]:
    inputs = {str(n.target) for n in program.entry(name).graph.nodes if n.op == "placeholder"}
    return [cache for cache in program.caches.values() if f"{cache.name}_k" in inputs]


def _distinct_weights(functions: tuple[Function, ...]) -> dict[str, int]:
    return {arg.name: arg.nbytes for f in functions for arg in f.args if arg.kind == "weight"}
