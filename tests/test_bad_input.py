"""Bad input as a user meets it: a process's exit code, and one sentence on standard error; nothing half-written."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_server import PIPELINE, POSITIONS, CommandServer, one_sentence
from transformers import LlamaConfig, LlamaForCausalLM

from specqd import artifact

pytest_plugins = ["tiny_artifact"]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = "model-00002-of-00004.safetensors"


def changed(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON file in place."""
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def cut(name: str, keep: int) -> Callable[[Path], Any]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size * (keep < 0) + keep)


def without(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def text(name: str, content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(content)


def settings(**fields: Any) -> Callable[[Path], Any]:
    return lambda folder: changed(folder / "config.json", lambda config: config.update(fields))


def weight_map(**places: str) -> Callable[[Path], Any]:
    return lambda folder: changed(folder / INDEX, lambda index: index["weight_map"].update(places))


def larger_tokenizer(folder: Path) -> None:
    words = {f"w{i}": i for i in range(51)}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "w0"}
    changed(folder / "tokenizer.json", lambda fields: fields.update(model=model, added_tokens=[]))


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(content)


MODELS = {
    "no weights": (without(WEIGHTS), ["has no model.safetensors nor"]),
    "no data": (cut(WEIGHTS, 0), [WEIGHTS, "is cut off or damaged"]),
    "header cut": (cut(WEIGHTS, 100), [WEIGHTS, "is cut off or damaged"]),
    "data cut": (cut(WEIGHTS, -1), [WEIGHTS, "is cut off or damaged"]),
    "header changed": (lambda folder: flip(folder / WEIGHTS, 20), [WEIGHTS, "is cut off or damaged"]),
    "no config": (without("config.json"), ["has no config.json"]),
    "config cut": (cut("config.json", 30), ["config.json is not valid JSON", "fetch it again"]),
    "architecture": (settings(model_type="llama17"), ["the architecture 'llama17'", "check the name"]),
    "architecture of no text": (settings(model_type=["x"]), ["names no model_type"]),
    "quantised": (settings(quantization_config="x"), ["already quantised (x)"]),
    "activation": (settings(hidden_act="foo"), ["does not know 'foo', which config.json asks for"]),
    "vocabulary": (settings(vocab_size="x"), ['says vocab_size: "x", which must be a whole number above 0']),
    "tokenizer larger": (larger_tokenizer, ["its token 'w50' has id 50, but the model embeds 50 tokens"]),
    "tokenizer cut": (cut("tokenizer.json", 99), ["is no tokenizer that can be read", "fetch it again"]),
    "its settings cut": (cut("tokenizer_config.json", 9), ["tokenizer_config.json is not valid JSON"]),
    "when to end": (text("generation_config.json", '{"eos_token_id": "x"}'), ["eos_token_id 'x'"]),
    "how to generate": (text("generation_config.json", "{"), ["generation_config.json is not valid JSON"]),
}
SHARDED = {
    "no shard": (without(SHARD), [f"lacks {SHARD}, listed in"]),
    "shard cut": (cut(SHARD, -5), [SHARD, "is cut off or damaged"]),
    "index cut": (cut(INDEX, 20), [f"{INDEX} is not valid JSON"]),
    "index of nothing": (text(INDEX, "{}"), ["has no weight_map"]),
    "tensor elsewhere": (weight_map(lost=SHARD), [f"says that {SHARD} holds lost, and it does not"]),
    "shard outside": (weight_map(lost="../x"), ["names the shard '../x', which is no file beside it"]),
    "shard of no text": (weight_map(lost=3), ["names the shard 3"]),
}


@pytest.mark.parametrize(
    ("source", "change", "texts"),
    [
        *(pytest.param("model", *case, id=name) for name, case in MODELS.items()),
        *(pytest.param("shards", *case, id=name) for name, case in SHARDED.items()),
    ],
)
def test_checkpoints(
    server: CommandServer, home: Path, place: Path, source: str, change: Callable, texts: list[str]
):
    model = shutil.copytree(home / source, place / "model")
    change(model)
    one_sentence(server.run("compile", str(model), "-o", str(place / "a"), *PIPELINE), *texts)
    assert {path.name for path in place.iterdir()} == {"model"}


def test_a_model_without_tokenizer(server: CommandServer, home: Path, place: Path):
    model = shutil.copytree(home / "model", place / "model")
    (model / "tokenizer.json").unlink()
    ended = server.run("compile", str(model), "-o", str(place / "a"), *PIPELINE)
    assert ended.code == 0
    assert "the model has no tokenizer.json: only Python, with token ids, can prompt" in ended.out
    one_sentence(server.run("generate", str(place / "a"), "-p", "a"), "has no tokenizer.json")


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("./missing", "neither a folder nor a .gguf file"),
        ("cache", "has no config.json"),
        ("model/config.json", "is a file, not a .gguf one"),
        ("nobody/none", "nobody/none is not a local folder, not in the Hugging Face cache"),
        ("a..b", "neither a local folder nor the id of a hub model"),
    ],
)
def test_models_that_are_nowhere(server: CommandServer, home: Path, model: str, sentence: str):
    (home / "cache").mkdir(exist_ok=True)
    one_sentence(server.run("compile", model, "-o", "new"), sentence)
    one_sentence(server.run("explain", model, "insert-kv-cache"), sentence)
    assert not (home / "new").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--context", "0"], "context of 0 cannot be used"),
        (["--context", "-5"], "context of -5 cannot be used"),
        (["--context", str(10**12)], f"the model knows {POSITIONS} positions, fewer than"),
        (["--context", str(POSITIONS + 1)], f"the model knows {POSITIONS} positions"),
        (["--context", "many"], "invalid value for '--context'"),
        (["--pipeline", f"insert-kv-cache{{capacity={10**12}}}"], "a capacity of 1000000000000 is more than"),
        (["--pipeline", "no-such-pass"], "no pass 'no-such-pass'"),
        (["--pipeline", "share-kv{"], "has a { without its partner"),
        (["--isa", "z80"], "no instruction set named 'z80'"),
        (["--plan", "target <- sibling"], "the plan names a level 'sibling', which the artifact has not"),
        (["--plan", "target <- draft@often"], "no draft-length rule 'often'"),
        (["--size", "batch=1"], "sizes can be given for an .onnx file"),
        (["--size", "batch=one"], "cannot read --size batch=one: write NAME=N, such as batch=1"),
        (["--draft", "model"], "cannot read --draft 'model': write NAME=MODEL"),
        (["--draft", "=model"], "cannot read --draft '=model': write"),
        (["--draft", "small="], "cannot read --draft 'small=': write"),
        (["--draft", "a=model", "--draft", "a=model"], "--draft gives 'a' twice"),
        (["--draft", "a-b=model"], "'a-b' cannot name a draft: use letters, digits and _"),
        (["--draft", "kleiné=model"], "'kleiné' cannot name a draft: use letters, digits and _"),
        (["--draft", "draft=model"], "'draft' cannot name a draft, for it means the model's own copy"),
        (["--draft", "suffix=model"], "'suffix' cannot name a draft, for it means a search of the text"),
        (
            ["--draft", "target=model", *PIPELINE],
            "'target' cannot name a draft, for it means the model itself",
        ),
        (["--draft", "small=./missing"], "no model at missing: it is neither a folder nor a .gguf file"),
        (["--frobnicate"], "no such option: --frobnicate"),
        (["--frobnicate"], "see `specqd compile --help`"),
    ],
)
def test_options_of_compile(server: CommandServer, home: Path, options: list[str], sentence: str):
    one_sentence(server.run("compile", "model", "-o", "new", *options), sentence)
    assert not (home / "new").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda model: model["vocab"].update(zz=50), "the model of its tokenizer is another"),
        (lambda model: model["vocab"].update(a=12, b=11), "the model of its tokenizer is another"),
        (None, "without both tokenizers nothing shows that the ids mean the same"),
    ],
)
def test_drafts_whose_tokens_mean_something_else(
    server: CommandServer, home: Path, place: Path, change: Callable | None, sentence: str
):
    small = shutil.copytree(home / "model", place / "small")
    if change:
        changed(small / "tokenizer.json", lambda fields: change(fields["model"]))
    else:
        (small / "tokenizer.json").unlink()
    larger = LlamaForCausalLM(LlamaConfig.from_pretrained(small, vocab_size=52)).bfloat16()
    larger.save_pretrained(small)
    ended = server.run("compile", "model", "-o", "new", *PIPELINE, "--draft", f"small={small}")
    one_sentence(ended, f"{small} cannot draft for this model", sentence)
    assert not (home / "new").exists()


def test_a_draft_of_another_checkpoint(server: CommandServer, home: Path, place: Path):
    """It is padded to more tokens, knows fewer positions, and drafts by the plan that is stored."""
    small = shutil.copytree(home / "model", place / "small")
    config = LlamaConfig.from_pretrained(small, vocab_size=52, max_position_embeddings=POSITIONS // 2)
    LlamaForCausalLM(config).bfloat16().save_pretrained(small)
    ended = server.run("compile", "model", "-o", str(place / "a"), *PIPELINE, "--draft", f"small={small}")
    assert (ended.code, ended.err) == (0, "")
    manifest = json.loads((place / "a" / "specqd.json").read_text())
    assert manifest["chain"] == ["target", "small"]
    assert manifest["levels"]["small"] == {"capacity": POSITIONS // 2, "vocab_size": 52}
    assert "small" in manifest["plan"]
    asked = ("generate", str(place / "a"), "-p", "abcabc", "-n", "30")
    plain = server.run(*asked, "--no-speculate")
    assert plain.code == 0
    assert server.run(*asked).out == plain.out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["-p", "a" * (POSITIONS + 1)], f"the prompt has {POSITIONS + 1} tokens and the cache holds 40"),
        (["-p", ""], "the prompt is empty"),
        (["-p", "-"], "standard input is empty"),
        (["-p", b"a\xff"], "the prompt holds bytes that are not UTF-8"),
        (["-p", "a", "-n", "0"], "cannot generate 0 tokens"),
        (["-p", "a", "-n", "-1"], "cannot generate -1 tokens"),
        (["-p", "a", "--threads", "0"], "cannot run on 0 threads"),
        (["-p", "a", "--threads", "-1"], "cannot run on -1 threads"),
        (["-p", "a", "--threads", "9999"], "cannot run on 9999 threads: this machine has"),
        (["-p", "a", "--threads", str(10**15)], f"cannot run on {10**15} threads"),
        ([], "missing option '-p' / '--prompt'; see `specqd generate --help`"),
        (
            ["-p", "a", "--temperature", "-1"],
            "cannot sample with temperature = -1.0: give a number of 0 or more",
        ),
        (["-p", "a", "--temperature", "nan"], "cannot sample with temperature = nan"),
        (["-p", "a", "--temperature", "warm"], "invalid value for '--temperature'"),
        (["-p", "a", "--temperature", "1", "--top-k", "-1"], "cannot sample with top_k = -1"),
        (["-p", "a", "--temperature", "1", "--top-p", "0"], "cannot sample with top_p = 0.0"),
        (["-p", "a", "--temperature", "1", "--min-p", "2"], "cannot sample with min_p = 2.0"),
        (["-p", "a", "--temperature", "1", "--seed", "-1"], "cannot sample with seed = -1"),
        (["-p", "a", "--temperature", "1", "--coupling", "x"], "coupling = 'x': give noise or rejection"),
        (["-p", "a", "--repetition-penalty", "0"], "cannot sample with repetition_penalty = 0.0"),
        (["-p", "a", "--top-k", "3"], "--top-k is about sampling, and the likeliest token is chosen"),
        (["-p", "a", "--seed", "3"], "--seed is about sampling"),
        (["-p", "a", "--stop", ""], "cannot stop at ''"),
        (["-p", "a", "--stop", b"a\xff"], "a stop string holds bytes that are not UTF-8"),
        (["-p", "", "--temperature", "1"], "the prompt is empty"),
    ],
)
def test_options_of_generate(server: CommandServer, built: Path, options: list, sentence: str):
    one_sentence(server.run("generate", str(built), *options), sentence)


def test_a_prompt_on_standard_input_that_is_no_text(server: CommandServer, built: Path):
    ended = server.run("generate", str(built), "-p", "-", stdin=b"a\xff")
    one_sentence(ended, "standard input holds bytes that are not UTF-8")


@pytest.mark.parametrize("options", [[], ["--temperature", "0.8", "--seed", "1", "--stop", "never met"]])
def test_a_prompt_of_special_tokens_alone(server: CommandServer, built: Path, options: list[str]):
    ended = server.run("generate", str(built), "-p", "<s></s>", "-n", "3", *options)
    assert (ended.code, ended.err) == (0, "")


def test_no_verb_shows_the_help_and_a_wrong_one_is_named(server: CommandServer):
    assert "generate" in server.run().out
    one_sentence(server.run("frobnicate"), "no such command 'frobnicate'; see `specqd --help`")


FILES = ["specqd.json", "lib.so", "weights.safetensors", "tokenizer.json", "tokenizer_config.json",
         "generation_config.json", "graphs/target.txt"]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["changed", "cut off", "missing"])
def test_artifacts(server: CommandServer, built: Path, place: Path, name: str, damage: str):
    copy = shutil.copytree(built, place / "a")
    path = copy / name
    if damage == "missing":
        path.unlink()
    elif damage == "cut off":
        os.truncate(path, path.stat().st_size // 2)
    else:
        flip(path, path.stat().st_size // 2)
    expected = "specqd.json" if name == "specqd.json" else str(path)
    one_sentence(server.run("generate", str(copy), "-p", "a"), expected, "`specqd compile`")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"triple": "riscv64-unknown-linux-gnu"}, "was compiled for riscv64 and this CPU is"),
        ({"cpu_features": ["avx9000"]}, "a CPU with avx9000, which this one"),
        ({"schema_version": 99}, "has format 99, this specqd reads"),
    ],
)
def test_artifacts_of_elsewhere(
    server: CommandServer, built: Path, place: Path, fields: dict[str, Any], sentence: str
):
    copy = shutil.copytree(built, place / "a")
    changed(copy / "specqd.json", lambda manifest: manifest.update(fields))
    changed(copy / "specqd.json", lambda manifest: manifest.update(digest=artifact._digest(manifest)))
    one_sentence(server.run("generate", str(copy), "-p", "a"), sentence, "compile")


@pytest.mark.parametrize("verb", [["generate", "-p", "a"], ["inspect"], ["bench"], ["tune"]])
def test_no_artifact(server: CommandServer, home: Path, verb: list[str]):
    why = {"nowhere": "there is no such folder", "model": "it has no specqd.json"}
    for place, sentence in {**why, "model/config.json": "it is not a folder"}.items():
        one_sentence(server.run(verb[0], place, *verb[1:]), f"{place} is no artifact: {sentence}")
