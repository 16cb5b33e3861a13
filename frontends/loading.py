"""Load a checked checkpoint with transformers, in the dtype it is stored in, and without its noise."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from specqd.errors import CaptureError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["load", "quietly"]


@contextmanager
def quietly() -> Iterator[None]:
    """Silence transformers' log, progress bars and warnings; what matters of them is raised."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load(path: Path) -> PreTrainedModel:
    """Return the model of a checked folder or .gguf file; raises CaptureError if a weight is missing."""
    from transformers import AutoModelForCausalLM

    where: dict[str, Any] = {"use_safetensors": True, "dtype": "auto"}
    if path.is_file():
        # GGUF keeps norms in float32 and matrices in blocks of its own; both come from a BF16 checkpoint.
        where = {"gguf_file": path.name, "dtype": torch.bfloat16}
    folder = path.parent if path.is_file() else path
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported, and refused below
            attn_implementation="eager",
            **where,
        )
    except Exception as error:
        raise CaptureError(f"transformers cannot load {path}: {_first_line(error)}") from error
    _check_complete(model, found, path)
    _refresh_buffers(model)
    return model.eval()


def _check_complete(model: PreTrainedModel, found: dict[str, Any], path: Path) -> None:
    if missing := sorted(found["missing_keys"]):
        raise CaptureError(
            f"{path} lacks {len(missing)} of the tensors that its architecture needs, such as {missing[0]}; "
            "check that config.json belongs to the weights, and fetch them again"
        )
    if mismatched := sorted(found["mismatched_keys"]):
        name, stored, wanted = mismatched[0]
        raise CaptureError(
            f"{path} holds {name} as {list(stored)} where config.json asks for {list(wanted)}; "
            "check that config.json belongs to the weights"
        )
    # Tensors of modules that the architecture lacks (a head, a tower) do no harm; a bias of one it has does.
    modules = {name for name, module in model.named_modules() if hasattr(module, "weight")}
    spare = (key.rpartition(".") for key in found["unexpected_keys"])
    unread = sorted(f"{module}.bias" for module, _, kind in spare if kind == "bias" and module in modules)
    if unread:
        raise CaptureError(
            f"{path} holds {unread[0]}, which the architecture that config.json describes would ignore; "
            "check that config.json belongs to the weights"
        )


def _refresh_buffers(model: PreTrainedModel) -> None:
    """Compute derived buffers (not in the checkpoint) again in float32 where loading made them in BF16.

    The graph computes in float32, so such a buffer (Gemma 3's embedding scale) must not be rounded either.
    """
    stale = False
    for tensor in (*model.parameters(), *model.buffers()):
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            if buffer is not None and buffer.dtype in (torch.bfloat16, torch.float16):
                module._buffers[name] = buffer.float()
                module._is_hf_initialized = False  # type: ignore[assignment]
                stale = True
    if stale:
        model.initialize_weights()


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
