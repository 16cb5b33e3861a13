"""Find a checkpoint and check it before transformers reads it, so that a fault is told in one sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from specqd.errors import CaptureError

__all__ = ["check_folder", "check_tokenizer", "find", "tokenizer_files"]

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_INDEX = "model.safetensors.index.json"
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings"),
    *("n_embd", "n_layer", "n_head", "n_positions", "n_inner"),
)
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "generation_config.json",
)


def find(source: str | Path) -> Path:
    """Return the folder or .gguf file that `source` names, downloading a hub id; raises CaptureError."""
    path = Path(source).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise CaptureError(f"{path} is a file, not a .gguf one; give the folder that holds config.json")
    text = str(source)
    local = isinstance(source, Path) or text.startswith((".", "~")) or path.suffix == ".gguf"
    if local or not _HUB_ID.fullmatch(text):
        raise CaptureError(f"no model at {path}: it is neither a folder nor a .gguf file; check the path")
    return _download(text)


def _download(name: str) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except errors.GatedRepoError as error:
        raise CaptureError(
            f"the hub model {name} wants its terms accepted; do so and log in, or give a local folder"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CaptureError(f"{name} is neither a local folder nor a model of the Hugging Face hub") from error
    except errors.HFValidationError as error:
        raise CaptureError(f"{name} is neither a local folder nor the id of a hub model; check it") from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError, ValueError) as error:
        raise CaptureError(
            f"{name} is not a local folder, not in the Hugging Face cache, and the hub cannot be reached "
            f"({type(error).__name__}); give a local folder, or go online once"
        ) from error


def check_folder(folder: Path) -> dict[str, Any]:
    """Return config.json of a folder whose family and weights can be used; raises CaptureError otherwise."""
    config = _read_json(folder / "config.json", "a Hugging Face model folder needs one")
    _check_family(config, folder)
    _check_sizes(config, folder)
    held = _held(_weight_files(folder))
    for tensor, shard in _promised(folder).items():
        if tensor not in held.get(shard, ()):
            raise CaptureError(
                f"{folder / _INDEX} says that {shard} holds {tensor}, and it does not; fetch both again"
            )
    return config


def _read_json(path: Path, why: str) -> dict[str, Any]:
    if not path.is_file():
        raise CaptureError(f"{path.parent} has no {path.name}; {why}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CaptureError(f"{path} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise CaptureError(f"{path} holds no JSON object but a {type(value).__name__}; fetch it again")
    return value


def _check_family(config: dict[str, Any], folder: Path) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    family = config.get("model_type")
    if not isinstance(family, str) or not family:
        raise CaptureError(f"{folder / 'config.json'} names no model_type, so the architecture is unknown")
    if family not in CONFIG_MAPPING_NAMES:
        remote = " (it brings its own code, which specqd does not run)" if "auto_map" in config else ""
        raise CaptureError(
            f"{folder / 'config.json'} asks for the architecture {family!r}, which transformers does not know"
            f"{remote}; check the name or install a newer transformers"
        )
    if config.get("is_encoder_decoder"):
        raise CaptureError(f"{folder} holds an encoder-decoder ({family}); specqd compiles causal decoders")
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise CaptureError(f"{folder} holds a {family} model, which is no causal language model")
    if "quantization_config" in config:
        settings = config["quantization_config"]
        method = settings.get("quant_method", "unknown") if isinstance(settings, dict) else settings
        raise CaptureError(
            f"{folder} holds weights already quantised ({method}); give the original BF16 checkpoint, "
            "which specqd quantises itself"
        )


def _check_sizes(config: dict[str, Any], folder: Path) -> None:
    for name in _SIZES:
        value = config.get(name)
        # A few families give a list, a size a layer.
        if value is None or isinstance(value, list) or (type(value) is int and value > 0):
            continue
        raise CaptureError(
            f"{folder / 'config.json'} says {name}: {json.dumps(value)}, which must be a whole number above 0; "
            "fetch it again"
        )


def _weight_files(folder: Path) -> list[Path]:
    index, single = folder / _INDEX, folder / "model.safetensors"
    if single.is_file():
        return [single]
    if not index.is_file():
        pickled = any(folder.glob("pytorch_model*.bin"))
        raise CaptureError(
            f"{folder} has no model.safetensors nor model.safetensors.index.json"
            + ("; specqd reads no pickled weights: save the model again as safetensors" if pickled else "")
        )
    paths = [folder / name for name in sorted(set(_promised(folder).values()))]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise CaptureError(f"{folder} lacks {', '.join(missing)}, listed in {index.name}; fetch it again")
    return paths


def _promised(folder: Path) -> dict[str, str]:
    """Return which shard holds which tensor, as the index says; nothing for weights in one file."""
    if (folder / "model.safetensors").is_file():
        return {}
    shards = _read_json(folder / _INDEX, "").get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CaptureError(
            f"{folder / _INDEX} has no weight_map saying which shard holds which tensor; fetch it again"
        )
    strange = [name for name in shards.values() if not isinstance(name, str) or Path(name).name != name]
    if strange:
        raise CaptureError(
            f"{folder / _INDEX} names the shard {strange[0]!r}, which is no file beside it; fetch it again"
        )
    return shards


def _held(paths: list[Path]) -> dict[str, frozenset[str]]:
    """Return the names of the tensors in each file, having checked that none of these is damaged or cut off."""
    from safetensors import SafetensorError, safe_open

    held = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as shard:
                held[path.name] = frozenset(shard.keys())
        except (SafetensorError, OSError) as error:
            raise CaptureError(f"{path} is cut off or damaged ({error}); fetch it again") from error
    return held


def tokenizer_files(folder: Path | None) -> tuple[str, ...]:
    """Paths of the files of a folder that say how text becomes tokens and when generation ends."""
    if folder is None:
        return ()
    return tuple(str(folder / name) for name in _TOKENIZER_FILES if (folder / name).is_file())


def check_tokenizer(files: Iterable[str], vocab_size: int) -> None:
    """Refuse damaged files, and a tokenizer that can give tokens the model has no embedding for."""
    for file in (Path(f) for f in files if f.endswith(("_config.json", "_map.json"))):
        _check_ending(_read_json(file, ""), file)
    path = next((f for f in files if Path(f).name == "tokenizer.json"), None)
    if path is None:
        return
    from tokenizers import Tokenizer

    try:
        tokens = Tokenizer.from_file(path).get_vocab(with_added_tokens=True)
    except Exception as error:  # tokenizers raises bare Exception
        raise CaptureError(f"{path} is no tokenizer that can be read ({error}); fetch it again") from error
    token, last = max(tokens.items(), key=lambda item: item[1], default=("", -1))
    if last >= vocab_size:
        raise CaptureError(
            f"the tokenizer {path} does not belong to the model: its token {token!r} has id {last}, but the "
            f"model embeds {vocab_size} tokens only"
        )


def _check_ending(settings: dict[str, Any], path: Path) -> None:
    value = settings.get("eos_token_id")
    if not all(isinstance(token, int) for token in (value if isinstance(value, list) else [value or 0])):
        raise CaptureError(
            f"{path} has the eos_token_id {value!r}, which is no token's number; fetch it again"
        )
