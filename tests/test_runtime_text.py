"""Tokenizing, chat templates as transformers renders them, and text that arrives in pieces."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import VOCAB, compile_toy, save_toy, write_tokenizer

from specqd.errors import ArtifactError, InputError
from specqd.runtime.chat import render
from specqd.runtime.model import load
from specqd.runtime.text import Text

CHATML = (
    "{% for message in messages %}{{ '<s>' + message['role'] + ' ' + message['content'] + '</s>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant ' }}{% endif %}"
)
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hü & <b>"}]


@pytest.fixture
def text(tmp_path: Path) -> Text:
    write_tokenizer(tmp_path, CHATML)
    return Text(tmp_path, VOCAB)


@settings(max_examples=300, deadline=None)
@given(
    tokens=st.lists(st.integers(0, VOCAB - 1) | st.sampled_from([8, 9, 10]), max_size=30),
    cuts=st.lists(st.integers(1, 4), min_size=1),
)
def test_pieces_add_up_to_the_text_of_the_whole(tmp_path_factory, tokens: list[int], cuts: list[int]):
    folder = tmp_path_factory.getbasetemp() / "tokenizer"
    if not folder.exists():
        folder.mkdir()
        write_tokenizer(folder)
    text = Text(folder, VOCAB)
    detokenizer = text.detokenizer()
    rest, pieces = list(tokens), []
    while rest:
        size = cuts[len(pieces) % len(cuts)]
        pieces.append(detokenizer.add(rest[:size]))
        rest = rest[size:]
    assert "".join(pieces) + detokenizer.finish() == text.decode(tokens)


def test_half_a_character_is_held_back(text: Text):
    detokenizer = text.detokenizer()
    first, second = text._tokenizer.token_to_id("Ã"), text._tokenizer.token_to_id("¼")
    assert [detokenizer.add([first]), detokenizer.add([second]), detokenizer.finish()] == ["", "ü", ""]
    broken = text.detokenizer()
    assert [broken.add([first]), broken.finish(), broken.finish()] == ["", "�", ""]


def test_leading_spaces_of_sentencepiece_survive_between_pieces(tmp_path: Path):
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "c": 2}, unk_token="c"))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    detokenizer = Text(tmp_path, 3).detokenizer()
    assert [detokenizer.add([token]) for token in (0, 1, 2, 1)] == ["a", " b", "c", " b"]


def test_chats_are_rendered_and_encoded(text: Text):
    assert text.render(MESSAGES) == "<s>system be brief</s><s>user hü & <b></s><s>assistant "
    assert text.encode_chat(MESSAGES)[0] == 0
    assert text.encode("ab") == [11, 12]


@pytest.mark.parametrize(
    "stored",
    [CHATML, [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]],
)
def test_templates_in_the_tokenizer_config(tmp_path: Path, stored: object):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": stored}))
    assert Text(tmp_path, VOCAB).chat_template == CHATML
    (tmp_path / "chat_template.jinja").write_text("a file wins")
    assert Text(tmp_path, VOCAB).chat_template == "a file wins"


TEMPLATES = {
    "chatml": CHATML,
    "trimmed": "{%- for m in messages %}\n    {%- if m.role == 'user' %}\n  U: {{ m.content }}\n"
    "    {%- endif %}\n{%- endfor %}\n",
    "special tokens": "{{ bos_token }}{{ messages[0]['content'] | trim }}{{ eos_token }}",
    "json": "{{ messages | tojson }} {{ messages | tojson(indent=2) }}",
    "loop controls": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}"
    "{{ m.content }}{% break %}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "namespace": "{% set n = namespace(c=0) %}{% for m in messages %}{% set n.c = n.c + 1 %}{% endfor %}{{ n.c }}",
    "tools": "{% if tools %}T{% else %}-{% endif %}{% if documents is defined and documents %}D{% endif %}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_templates_render_as_in_transformers(template: str):
    from transformers.utils.chat_template_utils import render_jinja_template

    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    theirs, _ = render_jinja_template(
        [MESSAGES], chat_template=template, add_generation_prompt=True, **tokens
    )
    assert render(template, MESSAGES, tokens) == theirs[0]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "template"),
        ("{{ messages[0].content.nothing.more }}", "template"),
        ("{{ messages.append(1) }}", "template"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "template"),
    ],
)
def test_a_template_that_fails_or_reaches_out_of_its_sandbox(template: str, said: str):
    with pytest.raises(InputError, match=said):
        render(template, MESSAGES, {})


def test_messages_hold_plain_data_only():
    with pytest.raises(InputError, match="holds a PosixPath"):
        render(CHATML, [{"role": "user", "content": Path("x")}], {})


def test_half_characters_are_refused(text: Text):
    with pytest.raises(InputError, match=r"the prompt has '\\udcff' at position 1, which is no character"):
        text.encode("a\udcff")
    with pytest.raises(InputError, match=r"'\\ud83d' at position \d+"):
        text.encode_chat([{"role": "user", "content": "\ud83d"}])


def test_missing_broken_and_foreign_tokenizers(tmp_path: Path):
    with pytest.raises(ArtifactError, match=r"has no tokenizer\.json"):
        Text(tmp_path, VOCAB)
    write_tokenizer(tmp_path)
    with pytest.raises(ArtifactError, match="has 50 entries and the model's vocabulary 30"):
        Text(tmp_path, 30)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ArtifactError, match="cannot read the tokenizer"):
        Text(tmp_path, VOCAB)


def test_an_added_token_beyond_the_vocabulary_is_refused_when_it_is_used(tmp_path: Path):
    from tokenizers import Tokenizer

    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.add_special_tokens(["<image>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = Text(tmp_path, VOCAB)
    assert text.encode("ab") == [11, 12]
    with pytest.raises(InputError, match=r"token 50 .'<image>'., beyond"):
        text.encode("a<image>")


def test_no_template_no_chat(tmp_path: Path):
    write_tokenizer(tmp_path)
    with pytest.raises(InputError, match="no chat template"):
        Text(tmp_path, VOCAB).encode_chat(MESSAGES)


def test_prompts_of_a_model_with_and_without_template(tmp_path: Path):
    compiled = compile_toy(tmp_path)
    save_toy(tmp_path / "base", compiled, write_tokenizer(tmp_path))
    save_toy(tmp_path / "chat", compiled, write_tokenizer(tmp_path, CHATML))
    base, chat = load(tmp_path / "base"), load(tmp_path / "chat")
    assert base.encode("ab") == chat.encode("ab", raw=True) == [11, 12]
    assert chat.encode("ab") == chat.encode([{"role": "user", "content": "ab"}]) != [11, 12]
    pieces: list[str] = []
    made = chat.generate("ab", 20, ignore_eos=True, on_text=pieces.append)
    assert "".join(pieces) == made.text == chat.text.decode(made.tokens)
    assert "".join(chat.stream("ab", 20, ignore_eos=True)) == made.text
    assert chat.last.new_tokens == 20


def test_pycode_tokenizes_as_in_transformers(shared: Path):
    from transformers import AutoTokenizer

    folder = shared / "models" / "pycode-90m"
    theirs, ours = AutoTokenizer.from_pretrained(folder), Text(folder, 16384)
    for line in (shared / "data" / "prompts_dev.jsonl").read_text("utf-8").splitlines()[:10]:
        sample = json.loads(line)["text"]
        tokens = theirs(sample).input_ids
        assert ours.encode(sample) == tokens
        assert ours.decode(tokens) == theirs.decode(tokens, skip_special_tokens=True)
