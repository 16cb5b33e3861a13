"""The models of benchmarks/coverage.py: 100 architectures of timm and 60 of transformers, with random weights."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import nn

__all__ = ["TIMM", "TRANSFORMERS", "mend_torchvision", "timm_model", "transformers_model"]

# fmt: off
TIMM = (
    "resnet18", "resnet50", "resnetv2_50", "resnext50_32x4d", "seresnet50", "wide_resnet50_2", "resnest14d",
    "res2net50_26w_4s", "mobilenetv1_100", "mobilenetv2_100", "mobilenetv3_small_100", "mobilenetv3_large_100",
    "mobilenetv4_conv_small", "efficientnet_b0", "efficientnet_lite0", "efficientnetv2_rw_t",
    "tf_efficientnet_b0", "mixnet_s", "mnasnet_100", "fbnetc_100", "spnasnet_100", "ghostnet_100",
    "ghostnetv2_100", "lcnet_050", "tinynet_e", "hardcorenas_a", "regnetx_002", "regnety_002", "densenet121",
    "vgg11", "vgg11_bn", "dpn68", "dla34", "hrnet_w18_small", "inception_v3", "inception_v4", "xception41",
    "nasnetalarge", "cspresnet50", "cspdarknet53", "darknet53", "rexnet_100", "repvgg_a0", "mobileone_s0",
    "convnext_atto", "convnext_tiny", "convnextv2_atto", "convmixer_768_32", "edgenext_xx_small",
    "poolformer_s12", "poolformerv2_s12", "caformer_s18", "vit_tiny_patch16_224",
    "vit_small_patch16_224", "vit_base_patch32_224", "vit_relpos_small_patch16_224",
    "vit_srelpos_small_patch16_224", "deit_tiny_patch16_224", "deit3_small_patch16_224",
    "deit_tiny_distilled_patch16_224", "beit_base_patch16_224", "beitv2_base_patch16_224", "cait_xxs24_224",
    "xcit_nano_12_p16_224", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swin_s3_tiny_224",
    "pit_ti_224", "tnt_s_patch16_224", "twins_pcpvt_small", "twins_svt_small", "pvt_v2_b0", "crossvit_tiny_240",
    "coat_tiny", "coat_lite_tiny", "levit_128s", "mixer_s16_224", "gmlp_s16_224", "resmlp_12_224",
    "mobilevit_xxs", "mobilevitv2_050", "efficientformer_l1", "efficientformerv2_s0", "fastvit_t8",
    "repvit_m0_9", "tiny_vit_5m_224", "maxvit_rmlp_pico_rw_256", "coatnet_pico_rw_224", "davit_tiny",
    "focalnet_tiny_srf", "gcvit_xxtiny", "visformer_tiny", "volo_d1_224", "sequencer2d_s",
    "inception_next_tiny", "starnet_s1", "hgnet_tiny", "hgnetv2_b0", "eva02_tiny_patch14_224", "tresnet_m",
)
TRANSFORMERS = (
    "albert", "bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra", "mpnet", "deberta",
    "deberta-v2", "convbert", "squeezebert", "funnel", "fnet", "ernie", "layoutlm", "mobilebert",
    "megatron-bert", "rembert", "roformer", "modernbert", "nystromformer", "ibert", "esm", "gpt2", "gpt_neo",
    "gpt_neox", "gptj", "opt", "bloom", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi", "phi3",
    "falcon", "olmo", "olmo2", "stablelm", "starcoder2", "cohere", "smollm3", "granite", "t5", "bart", "mbart",
    "pegasus", "marian", "blenderbot", "vit", "deit", "beit", "dinov2", "swin", "convnext", "segformer",
    "resnet", "mobilevit", "poolformer", "clip_vision_model", "siglip_vision_model", "wav2vec2", "hubert",
    "whisper", "audio-spectrogram-transformer", "wavlm", "data2vec-audio",
)
# fmt: on

#: sizes that make any configuration tiny, where it has them
_TINY = {
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "embedding_size": 32, "num_hidden_layers": 2,
    "n_layer": 2, "n_layers": 2, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2, "num_attention_heads": 4,
    "n_head": 4, "n_heads": 4, "num_heads": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 64, "n_inner": 64, "d_ff": 64, "d_kv": 8, "hidden_dim": 64,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "ffn_dim": 64, "vocab_size": 99, "max_position_embeddings": 64,
    "head_dim": 8, "image_size": 32, "patch_size": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "rotary_dim": 4, "word_embed_proj_dim": 32, "num_codevectors_per_group": 4, "conv_dim": (8, 8),
    "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2, "num_mel_bins": 16, "max_source_positions": 16, "max_target_positions": 16,
    "max_length": 32,
}  # fmt: skip


#: sizes that an architecture needs as they are, or does not let be set
_AS_THEY_ARE = {
    "convnext": ("patch_size", "num_hidden_layers"),
    "falcon": ("head_dim",),
    "funnel": ("num_hidden_layers",),
    "swin": ("image_size", "patch_size"),
}

#: what an architecture has no default for
_NEEDED = {"esm": {"vocab_size": 33, "pad_token_id": 0, "mask_token_id": 32}}


class _Tensors(nn.Module):
    """A model of transformers with fixed options, and the tensors among its outputs."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: torch.Tensor) -> Any:
        given = dict(zip(self.names, inputs, strict=True))
        options = {"use_cache": False} if hasattr(self.model.config, "use_cache") else {}
        found = self.model(**given, **options, return_dict=True)
        return tuple(value for value in found.values() if isinstance(value, torch.Tensor))


def timm_model(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """Make one case of timm's, at the size it was made for."""
    mend_torchvision()
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.append(_NoTorchvision())
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).eval()
    shape = timm.data.resolve_model_data_config(model)["input_size"]
    return model, (torch.randn(1, *shape),)


def transformers_model(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """Make one case of transformers', tiny."""
    mend_torchvision()
    import transformers

    config = transformers.CONFIG_MAPPING[name](**_NEEDED.get(name, {}))
    config.architectures = config.architectures or []  # of several, the first
    for key, value in _TINY.items():
        if isinstance(getattr(config, key, None), type(value)) and key not in _AS_THEY_ARE.get(name, ()):
            setattr(config, key, value)
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    tokens = torch.randint(3, 90, (1, 11))
    inputs: dict[str, torch.Tensor] = {"input_ids": tokens}
    main = model.main_input_name
    if main == "pixel_values":
        size = getattr(config, "image_size", 32)
        inputs = {main: torch.randn(1, 3, size, size)}
    elif main == "input_features":
        inputs = {main: torch.randn(1, config.num_mel_bins, 2 * config.max_source_positions)}
    elif main == "input_values":
        wave = not hasattr(config, "num_mel_bins")
        inputs = {
            main: torch.randn(1, 400) if wave else torch.randn(1, config.max_length, config.num_mel_bins)
        }
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens[:, :5]
    return _Tensors(model, tuple(inputs)), tuple(inputs.values())


def mend_torchvision() -> None:
    """Declare the operators that `import torchvision` asks for, where it was built for another torch.

    Model definitions need none of them, and neither timm nor transformers can be imported without.
    """
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return
    except RuntimeError:
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        for schema in (
            "nms(Tensor a, Tensor b, float c) -> Tensor",
            "qnms(Tensor a, Tensor b, float c) -> Tensor",
        ):
            torch.library.define(f"torchvision::{schema.partition('(')[0]}", f"({schema.partition('(')[2]}")


class _Name(type):
    """A class that has any attribute, each a class of its own."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, _Name(name, (nn.Module,), {}))
        return getattr(cls, name)


class _Absent(ModuleType):
    """A module of torchvision's names, none of which does anything."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(_Name(self.__name__, (), {}), name)


class _NoTorchvision:
    """Answers `import torchvision...` where it is not installed: timm's models import names of it, and use none."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "torchvision" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Absent(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        return None
