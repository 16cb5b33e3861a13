"""Hugging Face decoders: a folder, a hub id, a .gguf file or a transformers model becomes a Program."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from specqd.errors import CaptureError
from specqd.program import Entry, ModelInfo, Program

from .checkpoint import check_folder, check_tokenizer, find, tokenizer_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["capture"]


def capture(source: str | Path | PreTrainedModel, *, tokenizer: str | Path | None = None) -> Program:
    """Return a Program whose entry `target` computes the float32 logits of the decoder that `source` names.

    `source` is a local folder (config.json and safetensors), a hub id, a .gguf file, or a transformers model,
    which is left as it was. Weights keep their names and the dtype of the checkpoint (.gguf: BF16), each
    storage held once. `tokenizer` is a folder with tokenizer files, by default the one `source` is in.

    Raises CaptureError for a checkpoint that is damaged, incomplete or of another kind than its files say,
    and for a model that is not a causal decoder whose attention goes through transformers' attention
    interface.
    """
    from .loading import load, quietly
    from .tracing import trace

    with quietly():
        if isinstance(source, torch.nn.Module):
            model, home = _checked(source), None
        else:
            path = find(source)
            home = path if path.is_dir() else path.parent
            if path.is_dir():
                check_folder(path)
            model = load(path)
        files = tokenizer_files(Path(tokenizer) if tokenizer else home)
        check_tokenizer(files, model.get_input_embeddings().weight.shape[0])
        graph, weights, vocab_size, max_positions = trace(model)
    info = ModelInfo(
        family=model.config.model_type,
        vocab_size=vocab_size,
        max_positions=max_positions,
        eos_token_ids=_token_ids(model, "eos_token_id"),
        bos_token_id=next(iter(_token_ids(model, "bos_token_id")), None),
        source=str(model.name_or_path if isinstance(source, torch.nn.Module) else source),
        tokenizer_files=files,
    )
    return Program({"target": Entry("target", graph)}, weights, info)


def _checked(model: torch.nn.Module) -> PreTrainedModel:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise CaptureError(
            f"{type(model).__name__} is not a transformers model; give example_inputs to capture any other module"
        )
    if model.get_output_embeddings() is None:
        raise CaptureError(
            f"{type(model).__name__} has no language model head; load it as AutoModelForCausalLM"
        )
    away = next(
        (f"{n} is on {p.device}" for n, p in model.named_parameters() if p.device.type != "cpu"), None
    )
    if away:
        raise CaptureError(f"the weight {away}; move the model to the CPU first")
    return model


def _token_ids(model: PreTrainedModel, name: str) -> tuple[int, ...]:
    """Ids of a special token, from generation_config, else config; either holds an int, a list or None."""
    for settings in (getattr(model, "generation_config", None), model.config.get_text_config()):
        value = getattr(settings, name, None)
        if value is not None:
            return tuple(int(v) for v in value) if isinstance(value, (list, tuple)) else (int(value),)
    return ()
