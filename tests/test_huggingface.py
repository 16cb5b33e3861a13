"""Capture of Hugging Face decoders, against transformers' eager float32 logits of the same BF16 weights."""

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from family_configs import FAMILIES, FURTHER, LAYER_WINDOWS, POSITIONS, VOCAB, random_model
from torch import fx
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedModel

from specqd.frontends import capture
from specqd.program import Program
from specqd.reference import run

aten = torch.ops.aten
EVERY = FAMILIES | FURTHER
ATTENTION = torch.ops.specqd.causal_attention.default

# Dense families agree to the last bit. Experts are summed in another order, which costs a few 1e-6.
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}

Captured = Callable[[str], tuple[Path, Program, PreTrainedModel]]


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Captured:
    @cache
    def of(family: str) -> tuple[Path, Program, PreTrainedModel]:
        folder = tmp_path_factory.mktemp(family)
        random_model(EVERY[family]()).save_pretrained(folder)
        return folder, capture(folder), eager(folder)

    return of


def eager(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def tokens(rng: torch.Generator, length: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (1, length), generator=rng)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor, start: int = 0) -> torch.Tensor:
    positions = start + torch.arange(ids.shape[1])[None]
    return model(ids, position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=False).logits


def attention(program: Program) -> list[fx.Node]:
    return program.target.graph.find_nodes(op="call_function", target=ATTENTION)


@pytest.mark.parametrize("length", [1, 5, 17])
@pytest.mark.parametrize("family", EVERY)
def test_logits_are_those_of_transformers(
    family: str, length: int, captured: Captured, rng: torch.Generator
) -> None:
    _, program, model = captured(family)
    ids = tokens(rng, length)
    wanted = logits(model, ids)
    assert wanted.std() > 0.4, "the weights are too small for this comparison to mean anything"
    assert_close(run(program, program.target, ids), wanted, **TOLERANCE)


@pytest.mark.parametrize("family", EVERY)
def test_positions_are_taken_from_the_input(family: str, captured: Captured, rng: torch.Generator) -> None:
    _, program, model = captured(family)
    ids = tokens(rng, 6)
    got = run(program, program.target, ids, 20 + torch.arange(6)[None])
    assert_close(got, logits(model, ids, start=20), **TOLERANCE)


@pytest.mark.parametrize("family", EVERY)
def test_every_layer_attends_once_with_the_window_of_its_configuration(
    family: str, captured: Captured
) -> None:
    program = captured(family)[1]
    layers = EVERY[family]().num_hidden_layers
    assert [node.args[4] for node in attention(program)] == list(range(layers))
    assert [node.args[5] for node in attention(program)] == LAYER_WINDOWS.get(family, [0] * layers)
    assert {node.args[6] for node in attention(program)} == {2.0 if family == "gemma2" else 0.0}
    assert all((node.args[7] is not None) == (family == "gpt_oss") for node in attention(program))
    assert all(
        type(v) is t
        for n in attention(program)
        for v, t in zip(n.args[3:7], (float, int, int, float), strict=True)
    )


@pytest.mark.parametrize(
    ("family", "argument", "other"), [("mistral", 5, 0), ("gemma2", 6, 0.0), ("gpt_oss", 7, None)]
)
def test_windows_soft_caps_and_sinks_show_in_the_logits(
    family: str, argument: int, other: object, captured: Captured, rng: torch.Generator
) -> None:
    _, program, model = captured(family)
    ids, changed = tokens(rng, 17), program.copy()
    for node in attention(changed):
        node.update_arg(argument, other)
    assert (run(changed, changed.target, ids) - logits(model, ids)).abs().max() > 0.1


@pytest.mark.parametrize("family", EVERY)
def test_graphs_follow_the_convention(family: str, captured: Captured) -> None:
    _, program, model = captured(family)
    graph, stored = program.target.graph, dict(model.named_parameters(remove_duplicate=False))
    assert [n.target for n in graph.nodes if n.op == "placeholder"] == ["tokens", "positions"]
    assert graph.output_node().args[0].meta["val"].dtype == torch.float32
    assert program.model.vocab_size == graph.output_node().args[0].meta["val"].shape[-1] == VOCAB
    for name in program.used_weights():
        assert program.weights[name].dtype == (torch.bfloat16 if name in stored else torch.float32)
    for node in graph.nodes:
        assert node.op in ("placeholder", "get_attr", "call_function", "output")
        if isinstance(node.target, torch._ops.OpOverload):
            assert node.target.namespace in ("aten", "specqd")
            assert not node.target._schema.is_mutable
            assert node.target.overloadpacket not in NOTHING
            assert node.meta["nn_module_stack"] or node.target is aten.sym_size.int
        if node.target is aten.to.dtype:
            assert node.args[0].meta["val"].dtype != node.args[1]
        val = node.meta.get("val")
        assert not isinstance(val, torch.Tensor) or val.dtype in (torch.float32, torch.int64, torch.bool)


NOTHING = {
    aten.alias, aten.clone, aten.contiguous, aten.detach, aten.dropout, aten.lift_fresh_copy, aten.view,
    aten._assert_tensor_metadata,
}  # fmt: skip


def test_tied_weights_are_held_once(captured: Captured) -> None:
    program = captured("gemma")[1]
    embedding = program.target.graph.find_nodes(op="get_attr", target="model.embed_tokens.weight")
    readers = {node.target for weight in embedding for node in weight.users}
    assert readers == {aten.embedding.default, aten.linear.default}
    assert "lm_head.weight" not in program.weights


def test_numbers_kept_as_tensors_become_literals_in_float32(captured: Captured) -> None:
    # Loading in BF16 rounds this buffer to 6.9375; the graph computes in float32 and must not see that.
    graph = captured("gemma3_text")[1].target.graph
    scale = next(n for n in graph.nodes if n.target is aten.mul.Tensor and isinstance(n.args[1], float))
    assert scale.args[1] == float(torch.tensor(48.0).sqrt())


def test_a_model_object_is_captured_without_copies_and_left_as_it_was(rng: torch.Generator) -> None:
    model = random_model(FAMILIES["qwen3_moe"]()).train()
    before = {name: (id(p), p.dtype) for name, p in model.named_parameters()}
    settings = (model.config._attn_implementation, model.config._experts_implementation, model.config.dtype)
    program = capture(model)
    assert {name: (id(p), p.dtype) for name, p in model.named_parameters()} == before
    assert model.training
    assert (
        model.config._attn_implementation,
        model.config._experts_implementation,
        model.config.dtype,
    ) == settings
    held = dict(model.named_parameters())
    assert all(program.weights[n].data_ptr() == p.data_ptr() for n, p in held.items() if n in program.weights)
    assert set(held) <= set(program.weights)
    ids = tokens(rng, 7)
    assert_close(run(program, program.target, ids), logits(model.eval().float(), ids), **TOLERANCE)


def test_shards_and_one_file_give_the_same_program(captured: Captured, tmp_path: Path) -> None:
    folder, program, _ = captured("llama")
    AutoModelForCausalLM.from_pretrained(folder, dtype="auto").save_pretrained(
        tmp_path, max_shard_size="20KB"
    )
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    sharded = capture(str(tmp_path))
    assert sharded.weights.keys() == program.weights.keys()
    for name, weight in program.weights.items():
        assert_close(sharded.weights[name], weight, rtol=0, atol=0)
    assert str(sharded.target.graph) == str(program.target.graph)


def test_facts_about_the_model(tmp_path: Path) -> None:
    model = random_model(FAMILIES["llama"]())
    model.generation_config.eos_token_id = [2, 9]
    model.save_pretrained(tmp_path)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_text("{}")
    info = capture(tmp_path).model
    assert (info.family, info.max_positions, info.source) == ("llama", POSITIONS, str(tmp_path))
    assert (info.eos_token_ids, info.bos_token_id) == ((2, 9), 1)
    assert [Path(f).name for f in info.tokenizer_files] == [
        "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
    ]  # fmt: skip


def test_eos_comes_from_the_configuration_where_generation_has_none(tmp_path: Path) -> None:
    random_model(FAMILIES["llama"]()).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text("{}")
    assert capture(tmp_path).model.eos_token_ids == (2,)


def test_longrope_is_right_up_to_the_original_length(rng: torch.Generator) -> None:
    config = FAMILIES["phi3"]()
    config.original_max_position_embeddings = 16
    config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.3, 1.7, 2.0],
        "long_factor": [3.0] * 4,
    }
    model = random_model(config)
    program = capture(model)
    assert program.model.max_positions == 16
    ids = tokens(rng, 16)
    assert_close(run(program, program.target, ids), logits(model.float(), ids), **TOLERANCE)


def test_writes_through_views_become_functional(rng: torch.Generator) -> None:
    # DeepSeek fills its keys by writing into slices of an empty tensor; its values are narrower than keys.
    config = transformers.DeepseekV3Config(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=56, moe_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=12, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        first_k_dense_replace=1,
    )  # fmt: skip
    model = random_model(config)
    program = capture(model)
    ids = tokens(rng, 9)
    assert_close(run(program, program.target, ids), logits(model.float(), ids), **TOLERANCE)


def test_a_gguf_file_gives_the_model_it_was_made_from(tmp_path: Path, rng: torch.Generator) -> None:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=POSITIONS, tie_word_embeddings=True,
    )  # fmt: skip
    model = random_model(config)
    write_llama_gguf(tmp_path / "tiny.gguf", model)
    program = capture(tmp_path / "tiny.gguf")
    assert {w.dtype for n, w in program.weights.items() if n.endswith("proj.weight")} == {torch.bfloat16}
    ids = tokens(rng, 9)
    assert_close(run(program, program.target, ids), logits(model.float(), ids), **TOLERANCE)


def write_llama_gguf(path: Path, model: PreTrainedModel) -> None:
    """Write a Llama as llama.cpp's converter does: rotary pairs of queries and keys interleaved."""
    import gguf

    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in model.named_parameters():
        weight = parameter.detach().float()
        if count := heads.get(name.split(".")[-2]):
            weight = weight.reshape(count, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
def test_the_code_model_is_captured(shared: Path, rng: torch.Generator) -> None:
    folder = shared / "models" / "pycode-90m"
    program = capture(folder)
    assert len(attention(program)) == 12
    assert program.model.eos_token_ids == (0,)
    ids = tokens(rng, 17)
    assert_close(run(program, program.target, ids), logits(eager(folder), ids), **TOLERANCE)


def test_importing_the_frontends_loads_no_transformers() -> None:
    code = "import sys, specqd.frontends; print('transformers' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
