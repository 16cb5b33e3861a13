"""calibrate-mxfp4 on a small random Llama, against cast-mxfp4 and against texts that it did not see."""

import dataclasses

import pytest
import torch
from family_configs import random_model
from small_programs import DIM, Decoder, names, of, ops
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig

from specqd.errors import InputError
from specqd.frontends.huggingface import capture
from specqd.passes import Pipeline
from specqd.passes.match import weight_of
from specqd.passes.quantize import calibrate_mxfp4 as module
from specqd.passes.quantize.calibrate_mxfp4 import CalibrateMXFP4
from specqd.passes.quantize.cast_mxfp4 import CastMXFP4, decide
from specqd.passes.quantize.error_compensation import compensate
from specqd.passes.quantize.gram import grams
from specqd.passes.quantize.mxfp4 import SCALE_MAX, decode, encode_with
from specqd.passes.quantize.own_text import write
from specqd.passes.speculate.join import join
from specqd.program import ModelInfo

VOCAB = 97
CONFIG = LlamaConfig(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
BEFORE = "fuse-rms-norm, fuse-rope, fuse-linear, insert-kv-cache, derive-draft"


@pytest.fixture(scope="module", autouse=True)
def common_cache(tmp_path_factory):
    """A cache folder for these tests: what several of them ask for is calibrated once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECQD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("SPECQD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A folder with a tokenizer of the words w0 to w96."""
    folder = tmp_path_factory.mktemp("tokenizer")
    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def program(tokenizer):
    return Pipeline.parse(BEFORE)(capture(random_model(CONFIG), tokenizer=tokenizer))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A file of 600 words."""
    words = torch.randint(3, VOCAB, (600,), generator=torch.Generator().manual_seed(1)).tolist()
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(f"w{word}" for word in words))
    return path


@pytest.fixture
def calibrate(file):
    return lambda **options: CalibrateMXFP4(**{"text": str(file), "tokens": 256} | options)


def shape_of(program):
    """Everything about a program but the values of its weights."""
    weights = {name: (tensor.dtype, tensor.shape) for name, tensor in program.weights.items()}
    graphs = {name: str(entry.graph) for name, entry in program.entries.items()}
    return graphs, weights, program.caches, program.chain


def output_errors(program, cast, texts):
    """The squared error of each linear's outputs on texts, for the inputs that the uncast draft gives it."""
    entry, errors = program.entries["draft"], []
    linears = [node for node, form in decide(program, entry, "keep", ()) if form == "mxfp4"]
    for nodes, gram in grams(program, entry, linears, texts):
        for name in map(weight_of, nodes):
            parts = (cast.weights[f"{name}.mxfp4_{part}"] for part in ("blocks", "scales"))
            error = program.weights[name].double() - decode(*parts)
            errors.append((error @ gram * error).sum())
    return torch.stack(errors)


@pytest.mark.parametrize("lm_head", ["keep", "int8", "mxfp4"])
@pytest.mark.parametrize("keep", [(), ("*.down_proj.*",)])
def test_graph_and_weights_have_the_form_of_cast_mxfp4(program, calibrate, lm_head, keep):
    direct = CastMXFP4(scale="search", lm_head=lm_head, keep=keep)(program, "draft")
    result = calibrate(lm_head=lm_head, keep=keep)(program, "draft")
    assert shape_of(result.program) == shape_of(direct.program)
    assert (result.rewritten, result.refusals) == (direct.rewritten, direct.refusals)


@pytest.mark.parametrize("scale", ["floor", "even", "rceil", "search"])
def test_outputs_on_a_text_it_did_not_see_are_nearer_than_those_of_the_direct_cast(
    program, calibrate, scale, rng
):
    unseen = [torch.randint(3, VOCAB, (64,), generator=rng).tolist() for _ in range(8)]
    direct = CastMXFP4(scale=scale, lm_head="keep")(program, "draft").program
    cast = calibrate(scale=scale, lm_head="keep", tokens=512)(program, "draft").program
    ratios = output_errors(program, cast, unseen) / output_errors(program, direct, unseen)
    # What goes into the last MLP of a random model is hardly correlated: there a short text teaches nothing.
    assert ratios.mean() < 0.8 and ratios.max() < 1.1


def test_every_block_is_canonical(program, calibrate):
    after = calibrate(lm_head="mxfp4")(program, "draft").program
    stems = {name.removesuffix("_blocks") for name in after.weights if name.endswith("mxfp4_blocks")}
    assert len(stems) == 9
    for stem in stems:
        blocks, scales = (after.weights[f"{stem}_{part}"] for part in ("blocks", "scales"))
        values = decode(blocks, scales)
        assert int(scales.max()) <= SCALE_MAX and values.isfinite().all()
        assert torch.equal(encode_with(values, scales).blocks, blocks)


def test_a_second_run_changes_nothing_and_needs_no_text(program, calibrate):
    once = calibrate()(program, "draft").program
    again = calibrate(text="no such file")(once, "draft")
    assert again.rewrites == 0 and shape_of(again.program) == shape_of(once)
    assert {r.why.partition(":")[0] for r in again.refusals} == {"cast already"}


def test_the_target_stays(program, calibrate):
    after = calibrate()(program, "draft").program
    assert ops(after) == ops(program) and names(after) == names(program)


def test_the_same_text_gives_the_same_bytes_and_another_text_others(
    program, calibrate, tmp_path, monkeypatch
):
    one = calibrate()(program, "draft").program.weights
    monkeypatch.setenv("SPECQD_CACHE", str(tmp_path))
    two = calibrate()(program, "draft").program.weights
    (tmp_path / "other.txt").write_text("w5 w6 w7 w8 " * 200)
    other = calibrate(text=str(tmp_path / "other.txt"))(program, "draft").program.weights
    blocks = [name for name in one if name.endswith("mxfp4_blocks")]
    assert blocks and all(torch.equal(one[name], two[name]) for name in blocks)
    assert not all(torch.equal(one[name], other[name]) for name in blocks)


def test_a_draft_from_another_checkpoint_sees_what_it_knows(program, calibrate, tokenizer):
    small = LlamaConfig(**CONFIG.to_dict() | {"vocab_size": 40, "max_position_embeddings": 48})
    target, other = capture(random_model(CONFIG), tokenizer=tokenizer), capture(random_model(small))
    other.model = dataclasses.replace(other.model, tokenizer_files=target.model.tokenizer_files)
    joined = Pipeline.parse("fuse-linear, insert-kv-cache{capacity=48}")(join(target, other, "sibling"))
    result = calibrate()(joined, "sibling")
    assert result.rewrites == 9 and not result.refusals


# What is kept


def test_a_calibration_that_was_broken_off_goes_on_where_it_was(program, calibrate, cache, monkeypatch):
    whole = calibrate()(program, "draft").program
    kept = sorted((cache / "calibration").glob("*/*"))
    assert len(kept) == 8
    written = {file: file.stat().st_mtime_ns for file in kept}
    for file in kept[:3]:
        file.unlink()
    told, calibrated = [], []
    monkeypatch.setattr(module, "compensate", lambda *given: calibrated.append(1) or compensate(*given))
    again = calibrate()(program, "draft", lambda *what: told.append(what)).program
    assert len(calibrated) == 3
    assert told == [("calibrating", done, 8) for done in (5, 6, 7, 8)]
    assert all(torch.equal(again.weights[name], whole.weights[name]) for name in whole.weights)
    assert all(file.stat().st_mtime_ns == written[file] for file in kept[3:])


def test_a_text_is_written_once_for_a_seed(program, cache, monkeypatch):
    seeds = []
    monkeypatch.setattr(module, "write", lambda *given: seeds.append(given[2]) or write(*given))
    one, two, three = (
        CalibrateMXFP4(tokens=128, seed=seed, scale=scale, keep=("*.mlp.*",))(program, "draft").program
        for seed, scale in ((0, "search"), (0, "floor"), (1, "search"))
    )
    assert seeds == [0, 1]
    assert shape_of(one) == shape_of(two) == shape_of(three)


@pytest.mark.parametrize("option", [{"scale": "floor"}, {"damping": 0.5}, {"tokens": 128}])
def test_what_was_kept_with_other_options_is_not_taken(program, calibrate, option, cache):
    first = calibrate()(program, "draft").program.weights
    other = calibrate(**option)(program, "draft").program.weights
    assert len(list((cache / "calibration").iterdir())) == 2
    assert not all(torch.equal(first[name], other[name]) for name in first if "mxfp4" in name)


# Refusals


def test_what_cast_mxfp4_refuses_is_refused_alike(tokenizer, calibrate):
    parts = {"up": nn.Linear(DIM, 40), "down": nn.Linear(40, DIM)}
    program = of(Decoder(lambda m, x, _: m.down(torch.relu(m.up(x))) + x @ m.w, **parts, w=torch.eye(DIM)))
    program.model = ModelInfo("toy", VOCAB, 64, tokenizer_files=(str(tokenizer / "tokenizer.json"),))
    program.weights["embed.weight"] = torch.randn(VOCAB, DIM)
    direct = CastMXFP4(lm_head="keep")(program)
    assert calibrate(lm_head="keep")(program).refusals == direct.refusals
    assert {"its input has 40 channels, not a multiple of 32"} <= {r.why for r in direct.refusals}


def test_an_input_that_is_not_finite_is_refused_and_the_rest_cast(program, calibrate):
    broken = program.copy()
    name = next(name for name in broken.weights if "layers.1" in name and "post_attention_layernorm" in name)
    broken.weights[name] = torch.full_like(broken.weights[name], torch.inf)
    result = calibrate()(broken, "draft")
    assert {r.why for r in result.refusals} == {"its input is NaN or infinite on the calibration text"}
    assert len(result.refusals) == 2  # the second layer's MLP
    assert result.rewrites == 7


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"w1 w2 w3", r"words.txt holds 3 tokens, fewer than tokens=256: give a longer text"),
        (b"w1 \xff\xfe", r"words.txt is not UTF-8 \(byte 3\): convert it"),
        (b"", r"holds 0 tokens"),
        (None, r"cannot read the text .*words.txt: No such file"),
    ],
)
def test_a_text_that_cannot_be_used_is_an_error(program, calibrate, tmp_path, content, why):
    path = tmp_path / "words.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=why):
        calibrate(text=str(path))(program, "draft")


def test_a_file_needs_the_tokenizer(program, calibrate):
    bare = program.copy()
    bare.model = ModelInfo("toy", VOCAB, 64)
    with pytest.raises(InputError, match=r"words.txt cannot be used: .* without tokenizer.json; add it"):
        calibrate()(bare, "draft")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("tokens=127", "calibrate-mxfp4: 127 tokens are too few to calibrate on; give 128 or more"),
        ("damping=0", "a damping of 0.0 cannot be used; give more than 0"),
        ("damping=-1", "a damping of -1.0"),
        ("damping=nan", "a damping of nan"),
        ("damping=inf", "a damping of inf"),
        ("scale=best", r"option scale: 'best' is not one of floor \| even \| rceil \| search"),
        ("lm_head=int4", r"option lm_head: 'int4' is not one of keep \| int8 \| mxfp4"),
        ("seed=now", "option seed: 'now' is not int"),
    ],
)
def test_an_option_out_of_range_is_an_error(options, why):
    with pytest.raises(InputError, match=why):
        Pipeline.parse(f"calibrate-mxfp4{{{options}}}")


def test_text_round_trips():
    text = 'draft: calibrate-mxfp4{text="my notes.txt",tokens=2048,damping=0.05,seed=7}'
    assert str(Pipeline.parse(text)) == text
