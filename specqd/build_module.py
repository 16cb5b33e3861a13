"""The compile driver for modules that are no language models: passes, codegen, artifact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specqd.artifact import Manifest, Refused, save

if TYPE_CHECKING:
    from specqd.codegen.isa import ISA
    from specqd.passes import Pipeline
    from specqd.program import Program
    from specqd.tuning import Tuning

__all__ = ["DEFAULT_PIPELINE", "calibrated_on", "compile_module"]

#: what is done to any module: batch norms that follow a convolution or a matrix go into its weights
DEFAULT_PIPELINE = "fold-batch-norm"


def calibrated_on(pipeline: str) -> str:
    """Name the contents of the data that the passes of a pipeline calibrate on."""
    from specqd.passes import Pipeline
    from specqd.passes.prune.calibration_data import Data, Samples

    passes: list[Any] = [step.action for step in Pipeline.parse(pipeline).steps]
    return " ".join(
        p.data.fingerprint(Samples(p.samples, p.seed, p.pixels))
        for p in passes
        if isinstance(getattr(p, "data", None), Data)
    )


def compile_module(
    program: Program,
    target: Path,
    isa: ISA,
    *,
    steps: Pipeline | None,
    force: bool,
    tell: Callable[[str, int, int], None],
    cache: Path | None,
    tuning: Tuning | None = None,
) -> Manifest:
    """Compile the target of a program into the artifact directory `target`.

    Raises:
        ContractError: a pass refuses the program.
        CodegenError: the program cannot be compiled; names every operator with its place and the reason.
        InputError: the database of tuned kernels is none, or no RPC tracker answers.
        ArtifactError: the disk is full.
    """
    from specqd.codegen.general.build import build
    from specqd.passes import Pipeline

    if steps is None:
        steps = Pipeline.parse(DEFAULT_PIPELINE)
    tell("rewriting the graph", 0, 0)
    program = steps(program, tell=tell)
    compiled = build(program, isa, tell, cache, tuning)
    tell("writing the weights", 0, 0)
    return save(
        target,
        compiled,
        _facts(program, str(steps)),
        graphs={name: f"{entry.graph}\n" for name, entry in program.entries.items()},
        force=force,
    )


def _facts(program: Program, pipeline: str) -> dict[str, Any]:
    return {
        "family": program.model.family,
        "source": program.model.source,
        "pipeline": pipeline,
        "chain": program.chain,
        "capacity": 0,
        "vocab_size": 0,
        "eos_token_ids": (),
        "plan": "",
        "refusals": tuple(
            Refused(step=event.step, entry=event.entry, node=node, why=why)
            for event in program.history
            for node, why in event.refused
        ),
    }
