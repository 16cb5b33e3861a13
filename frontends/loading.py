"""Load a checked checkpoint with transformers, in the dtype it is stored in, and without its noise."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from specqd.errors import CaptureError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["load", "quietly"]


@contextlib.contextmanager
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
    try:
        model, found = _from_folder(path) if path.is_dir() else _from_gguf(path)
    except Exception as error:
        raise CaptureError(f"transformers cannot load {path}: {_first_line(error)}") from error
    _check_complete(model, found, path)
    _refresh_buffers(model)
    return model.eval()


def _from_folder(path: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path,
        dtype="auto",
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported, and refused below
        attn_implementation="eager",
    )


def _from_gguf(path: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    # from_pretrained(gguf_file=...) would need `accelerate`; its parts do the same without. GGUF keeps norms
    # in float32 and matrices in blocks of its own, all made from a BF16 checkpoint: BF16 it becomes again.
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar takes no notice of the switch
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, attn_implementation="eager"
            )
        read = load_gguf_checkpoint(path, True, model_to_load=model, torch_dtype=torch.bfloat16)
    model.load_state_dict(read["tensors"], strict=False, assign=True)
    model.tie_weights()
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    return model, {"missing_keys": missing, "mismatched_keys": [], "unexpected_keys": []}


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
    """Compute derived buffers (not in the checkpoint) in float32 where loading made them in BF16, or not.

    The graph computes in float32, so such a buffer (Gemma 3's embedding scale) must not be rounded either.
    """
    stale: list[tuple[nn.Module, str, torch.Tensor]] = []
    for tensor in (*model.parameters(), *model.buffers()):
        tensor._is_hf_initialized = True
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            old = module._buffers[name]
            if old is None or not (old.is_meta or old.dtype in (torch.bfloat16, torch.float16)):
                continue
            dtype = torch.float32 if old.is_floating_point() else old.dtype
            unset = float("nan") if old.is_floating_point() else 0
            module._buffers[name] = torch.full(old.shape, unset, dtype=dtype)
            module._is_hf_initialized = False
            stale.append((module, name, old))
    if stale:
        model.initialize_weights()
    for module, name, old in stale:
        if torch.isnan(module.get_buffer(name)).any():
            if old.is_meta:
                raise CaptureError(
                    f"{type(module).__name__} cannot compute its {name}; give a folder instead"
                )
            module._buffers[name] = old.float()


def _first_line(error: BaseException) -> str:
    if isinstance(error, KeyError):
        return f"it does not know {error}, which config.json asks for"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A line that ends so is the heading of the one that says what is wrong.
    told = lines[:2] if lines and lines[0].endswith(":") else lines[:1]
    return " ".join(told) or type(error).__name__
