"""`torch.compile(model, backend="specqd")`: graphs that Dynamo finds become artifacts, weights bound."""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.aot_compile_types import GraphModuleSerializableCallable
from torch._functorch.aot_autograd import aot_module_simplified
from torch._inductor.runtime.cache_dir_utils import temporary_cache_dir
from torch.utils._python_dispatch import _disable_current_modes

from specqd.build_module import DEFAULT_PIPELINE, calibrated_on
from specqd.digest import digest
from specqd.errors import CaptureError, CodegenError, ContractError, InputError
from specqd.frontends.dynamo_bound import BoundGraph
from specqd.frontends.dynamo_compiled import CompiledGraph, load_own
from specqd.frontends.dynamo_graph import program_of
from specqd.program import Program
from specqd.runtime.cpu import cpu_features
from specqd.runtime.module import Module
from specqd.tuning import Tuning

__all__ = ["Build", "Options", "backend", "compiled"]

_CHOICES = {
    "precision": ("exact", "bf16", "int8"),
    "fallback": ("eager", "error"),
    "tune": ("none", "cached", "full"),
}


@dataclass(frozen=True)
class Options:
    """What `torch.compile(..., options={...})` may say.

    Attributes:
        pipeline: passes that are applied to each graph, as text; None for those of any module.
        precision: `exact`: float32 stays float32. `bf16`: products multiply BF16, for cast-bf16 ends the pipeline.
            `int8`: they multiply INT8; `pipeline` has to say on which data scales are found, with quantize-int8.
        fallback: what is done with a graph that cannot be compiled: `eager` runs it in torch and warns, `error` raises.
        cache_dir: where compiled graphs are kept for the next process; None keeps none.
        tune: how kernels are cut. `none` leaves it to specqd, `cached` takes what was measured, `full` measures more.
        minutes: time that `full` takes for each graph.
    """

    pipeline: str | None = None
    precision: str = "exact"
    fallback: str = "eager"
    cache_dir: str | None = None
    tune: str = "none"
    minutes: float = 5.0

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> Options:
        """Check options; raises InputError for unknown ones and for values that are not to be had."""
        known = [field.name for field in fields(cls)]
        for name, value in (given or {}).items():
            if name not in known:
                raise InputError(f"the backend has no option {name!r}; it has {', '.join(known)}")
            choices = _CHOICES.get(name)
            if choices and value not in choices:
                raise InputError(
                    f"{name}={value!r} is not to be had; there is {', '.join(map(repr, choices))}"
                )
        chosen = cls(**(given or {}))
        Tuning(chosen.minutes)  # which checks them
        if chosen.precision == "int8" and "quantize-int8" not in (chosen.pipeline or ""):
            raise InputError(
                "precision='int8' needs data to find scales on: name them in the pipeline, as "
                "pipeline='fold-batch-norm, quantize-int8{data=FOLDER}', or data=random for a first try"
            )
        return chosen

    @property
    def tuning(self) -> Tuning | None:
        """What `tune` and `minutes` say; None for no tuning."""
        return None if self.tune == "none" else Tuning(self.minutes if self.tune == "full" else 0)

    @property
    def passes(self) -> str | None:
        """The pipeline with what the precision adds to it; None for that of any module."""
        if self.precision != "bf16":
            return self.pipeline
        before = DEFAULT_PIPELINE if self.pipeline is None else self.pipeline
        return ", ".join(filter(None, (before.strip(), "cast-bf16")))


Build = Callable[[Program, Options], Callable[..., Any]]
"""Makes a function of a program's inputs, which gives its outputs: one, or a tuple of several."""


def backend(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: Any = None
) -> Callable[..., Any]:
    """Compile one graph of Dynamo's; torch calls this.

    1. Parameters and buffers are bound as they are now; a graph whose weights were changed or replaced since runs in
       eager torch, with a warning. Torch does not tell when a tensor made in inference mode is changed.
    2. Sizes that Dynamo leaves open stay open: one compilation serves all lengths.

    Raises:
        InputError: an option is unknown, or gradients are asked for.
        CodegenError: the graph cannot be compiled and `fallback` is "error".
    """
    return compiled(gm, example_inputs, Options.of(options), _artifact)


def compiled(
    gm: fx.GraphModule, example_inputs: Sequence[Any], chosen: Options, build: Build
) -> Callable[..., Any]:
    """Compile one graph of Dynamo's with what `build` makes of its Program; raises as `backend` does."""
    _demand_inference(example_inputs)
    bound = {at: value for at, value in enumerate(example_inputs) if _is_weight(value)}
    inner = _bound(gm, bound)
    free = [value for at, value in enumerate(example_inputs) if at not in bound]

    def compile_graph(gm: Any, example_inputs: Sequence[Any]) -> Any:
        with _disable_current_modes(), torch.no_grad():  # AOTAutograd calls this while everything is fake
            program, outputs = program_of(gm, [*bound.values()])
            return CompiledGraph(outputs, build(program, chosen) if program else None)

    try:
        with _empty_cache():
            run = aot_module_simplified(inner, free, compile_graph, inference_compiler=compile_graph)
    except (CodegenError, CaptureError, ContractError) as error:
        if chosen.fallback == "error":
            raise
        warnings.warn(f"specqd runs a graph in eager torch: {error}", stacklevel=2)
        return GraphModuleSerializableCallable(gm)
    return BoundGraph(run, bound, gm.forward, chosen.fallback == "eager")


@contextmanager
def _empty_cache() -> Iterator[None]:
    """Let torch find nothing in its cache: for `aot_compile` it keeps graphs there, whatever the values of weights."""
    if not torch._functorch.config.force_autograd_cache:
        yield
        return
    with tempfile.TemporaryDirectory() as folder, temporary_cache_dir(folder):
        yield


def _demand_inference(example_inputs: Sequence[Any]) -> None:
    if torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in example_inputs):
        raise InputError(
            "the specqd backend compiles for inference, and gradients are asked for: call the model under "
            "torch.no_grad() or torch.inference_mode(), or set requires_grad_(False) on it"
        )


def _is_weight(value: Any) -> bool:
    return isinstance(value, torch.nn.Parameter) or (
        isinstance(value, Tensor) and getattr(value, "_dynamo_static_input_type", None) is not None
    )


def _bound(gm: fx.GraphModule, bound: Mapping[int, Tensor]) -> fx.GraphModule:
    """Return the graph with the inputs at these places held by the module itself."""
    graph = fx.Graph()
    held: dict[fx.Node, fx.Node] = {}
    holder = torch.nn.Module()
    for name, child in gm.named_children():
        holder.add_module(name, child)
    for at, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        if at in bound:
            holder.register_buffer(f"weight_{at}", bound[at].detach())
            held[node] = graph.get_attr(f"weight_{at}")
    for node in gm.graph.nodes:
        if node.op == "get_attr" and not hasattr(holder, str(node.target).split(".")[0]):
            setattr(holder, str(node.target), getattr(gm, str(node.target)))
    graph.output(graph.graph_copy(gm.graph, held))
    return fx.GraphModule(holder, graph)


def _artifact(program: Program, options: Options) -> Callable[..., Any]:
    from specqd.build import compile_model

    if options.cache_dir is None:
        return load_own(
            lambda folder: compile_model(program, folder, pipeline=options.passes, tuning=options.tuning)
        )
    place = Path(options.cache_dir) / _key(program, options)
    if not place.exists():
        compile_model(program, place, pipeline=options.passes, tuning=options.tuning)
    return Module.open(place)


def _key(program: Program, options: Options) -> str:
    from specqd.artifact import specqd_version

    data = calibrated_on(options.passes or "")
    made_by = (
        specqd_version(),
        torch.__version__,
        sorted(cpu_features()),
        options.passes,
        options.tune,
        data,
    )
    text = hashlib.sha256(str(made_by).encode())
    for node in program.target.graph.nodes:
        value = node.meta.get("val")
        text.update(f"{node.format_node()} {value} {_ranges(value)}".encode())
    for name, weight in program.weights.items():
        text.update(f"{name} {digest(weight)}".encode())
    return text.hexdigest()


def _ranges(value: Any) -> list[str]:
    """The limits of the sizes of a tensor that are left open: two graphs may differ in nothing else."""
    sizes: tuple[Any, ...] = tuple(value.shape) if isinstance(value, Tensor) else ()
    return [str(s.node.shape_env.bound_sympy(s.node.expr)) for s in sizes if isinstance(s, torch.SymInt)]
