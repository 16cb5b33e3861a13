"""The contract every pass is held to, and pipelines as text."""

import subprocess
import sys
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_programs import DIM, Decoder, logits, of, ops
from torch import fx

from specqd.errors import ContractError, InputError
from specqd.passes import Pass, Pipeline, Progress, Refusal, Step, options, registered
from specqd.passes.fuse_linear import FuseLinear
from specqd.passes.fuse_rope import FuseRope
from specqd.passes.quantize.cast_mxfp4 import CastMXFP4
from specqd.passes.rewrite import replace
from specqd.passes.watchers import Timing, diff, dump_to, verify

aten = torch.ops.aten

TEXTS = [
    "",
    "fuse-rope",
    "insert-kv-cache{capacity=512}, fuse-rms-norm, derive-draft, draft: cast-mxfp4{scale=search}",
    "draft: share-kv",
    "cast-mxfp4{lm_head=keep,keep=*.o_proj.*|lm_head.weight}",
    'cast-mxfp4{keep="model.layers.0.{q_proj+k_proj}.weight"|"a|b"}',
    "insert-kv-cache{dtype=float32}, derive-draft{entry=second}",
]


class NegateTwice(Pass):
    """Replace relu by two negations of it. Attributes are for tests.

    Attributes:
        count: how many to replace.
        mode: how to behave.
    """

    name = "negate-twice"
    count: int = 1
    mode: Literal["right", "silent", "stranger", "bug", "wrong result"] = "right"

    def requires(self, program, entry):
        return None if self.count < 9 else "there are nine"

    def ensures(self, program, entry):
        return "it is wrong" if self.mode == "wrong result" else None

    def run(self, program, entry):
        found = [n for n in entry.graph.nodes if n.target is aten.relu.default]
        for node in found[: self.count]:
            with entry.graph.inserting_after(node):
                first = entry.graph.call_function(aten.neg.default, (node,))
            with entry.graph.inserting_after(first):
                second = entry.graph.call_function(aten.neg.default, (first,))
            node.replace_all_uses_with(second, delete_user_cb=lambda user, one=first: user is not one)
            if self.mode == "stranger":
                yield fx.Graph().placeholder("x")
            if self.mode == "bug":
                raise KeyError("lost")
            if self.mode != "silent":
                yield second
        for node in found[self.count :]:
            yield Refusal(node.name, f"only {self.count} at a time")


class TakeLong(Pass):
    """Change nothing, slowly."""

    name = "take-long"

    def run(self, program, entry):
        yield Progress("dawdling", 0, 2)
        yield Refusal("relu", "no hurry")
        yield Progress("dawdling", 1, 2)


class AddOne(Pass):
    """Claim to be lossless and add one to every relu."""

    name = "add-one"

    def run(self, program, entry):
        for node in entry.graph.find_nodes(op="call_function", target=aten.relu.default):
            yield replace(node, aten.add.Tensor, (*node.args, 1))


@pytest.fixture
def program():
    return of(Decoder(lambda m, x, _: torch.relu(torch.relu(x) - 0.1), w=torch.ones(DIM)))


@pytest.mark.parametrize("text", TEXTS)
def test_text_round_trips(text):
    assert str(Pipeline.parse(text)) == text


@given(st.lists(st.text(max_size=8), max_size=4).map(tuple), st.sampled_from(["floor", "search"]))
def test_any_option_value_round_trips(keep, scale):
    made = Pipeline.of(Step(CastMXFP4(scale=scale, keep=keep), "draft"))
    assert Pipeline.parse(str(made)) == made


def test_text_may_be_spaced_freely_and_defaults_need_not_be_said():
    loose = Pipeline.parse(" draft :cast-mxfp4{ scale = floor , lm_head=keep },\n fuse-rope ")
    assert str(loose) == "draft: cast-mxfp4{lm_head=keep}, fuse-rope"


WRONG = {
    "fuse-rop": r"no pass 'fuse-rop'; did you mean fuse-rope; the passes are .*cast-mxfp4, .*share-kv",
    "cast-mxfp4{bits=4}": r"cast-mxfp4 has no option 'bits'; it has scale, lm_head, keep",
    "fuse-rope{x=1}": r"fuse-rope has no option 'x'; it has none",
    "cast-mxfp4{scale=best}": r"option scale: 'best' is not one of floor \| even \| rceil \| search",
    "insert-kv-cache{capacity=many}": r"insert-kv-cache: option capacity: 'many' is not int",
    "cast-mxfp4{scale}": r"cast-mxfp4: give the option scale once, as scale=value",
    "cast-mxfp4{scale=even,scale=even}": r"give the option scale once",
    "fuse-rope,,fuse-rope": r"cannot read the pipeline step ''",
    "fuse rope": r"cannot read the pipeline step 'fuse rope'; write pass, pass\{option=value\}",
    "cast-mxfp4{scale=even": r"has a \{ without its partner",
    "fuse-rope}": r"has a \} at character 10 without its partner",
    'cast-mxfp4{keep="a}': r'has a " at character 17 without its partner',
}


@pytest.mark.parametrize(("text", "message"), WRONG.items(), ids=WRONG)
def test_what_cannot_be_read_names_what_could_be(text, message):
    with pytest.raises(InputError, match=message):
        Pipeline.parse(text)


def test_pipelines_join():
    joined = Pipeline.parse("fuse-rope") + FuseLinear() + "draft: share-kv"
    assert str(joined) == "fuse-rope, fuse-linear, draft: share-kv"
    assert str("fuse-linear" + Pipeline.of(FuseRope())) == "fuse-linear, fuse-rope"
    with pytest.raises(InputError, match="a pipeline is made of passes, steps and texts, not 3"):
        Pipeline.of(3)


def test_a_step_without_an_entry_applies_to_all_there_are(program):
    after = Pipeline.parse("derive-draft, negate-twice, draft: negate-twice")(program)
    assert [(e.step, e.entry, len(e.rewritten)) for e in after.history] == [
        ("derive-draft", "target", 1), ("negate-twice", "target", 1), ("negate-twice", "draft", 1),
        ("negate-twice", "draft", 1),
    ]  # fmt: skip
    assert after.history[1].refused == (("relu_1", "only 1 at a time"),)
    assert ops(program).count("aten.neg") == 0


def test_an_entry_that_does_not_exist_is_an_error(program):
    with pytest.raises(InputError, match="no entry 'draft'; it has target"):
        Pipeline.parse("draft: fuse-rope")(program)


def test_weights_that_nothing_reads_are_dropped(program):
    program.weights["left.over"] = torch.zeros(1)
    assert "left.over" in NegateTwice()(program).program.weights
    assert set(Pipeline.of(NegateTwice())(program).weights) == {"embed.weight", "lm_head.weight"}


def test_a_result_counts_what_was_yielded_and_the_input_stays_as_it_was(program):
    before = str(program.target.graph)
    result = NegateTwice(count=2)(program)
    assert result.rewrites == 2 and result.rewritten == ("neg_default_1", "neg_default_3")
    assert str(program.target.graph) == before and not program.history
    assert torch.equal(logits(result.program), logits(program))


@pytest.mark.parametrize(
    ("mode", "message"),
    {
        "silent": "negate-twice changed target without yielding a node",
        "stranger": "negate-twice yielded x; yield new nodes of the program, refusals and notes",
        "bug": r"negate-twice failed on target, a bug in the pass: KeyError\('lost'\)",
        "wrong result": "negate-twice on target: after the pass, it is wrong",
    }.items(),
)
def test_a_broken_promise_is_an_error_of_the_pass(program, mode, message):
    with pytest.raises(ContractError, match=message):
        NegateTwice(mode=mode, count=2)(program)


def test_a_precondition_is_checked_first(program):
    with pytest.raises(ContractError, match="negate-twice on target: before the pass, there are nine"):
        NegateTwice(count=9)(program)


def test_a_pass_is_a_value():
    assert NegateTwice(count=2) == NegateTwice(count=2) != NegateTwice()
    assert {NegateTwice(), NegateTwice()} == {NegateTwice()}
    with pytest.raises(AttributeError):
        NegateTwice().count = 3
    with pytest.raises(InputError, match="negate-twice: option count: True is not one of int"):
        NegateTwice(count=True)


GOOD = {"__doc__": "Do nothing.", "name": "bad"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"__doc__": "x"}, "the pass Bad needs a name in kebab-case, not None"),
        ({"__doc__": "x", "name": "Bad_Name"}, "needs a name in kebab-case, not 'Bad_Name'"),
        ({"name": "bad"}, "the pass Bad needs a docstring"),
        ({"__doc__": "x", "name": "fuse-rope"}, "two passes are named 'fuse-rope'"),
        ({**GOOD, "__annotations__": {"m": int}}, "the option 'm' of the pass bad needs a default"),
        (
            {**GOOD, "m": [], "__annotations__": {"m": list}},
            "the options of the pass bad need plain defaults",
        ),
        ({**GOOD, "run": 1, "__annotations__": {"run": int}}, "cannot have an option 'run'"),
        ({**GOOD, "__annotations__": {"name": str}}, "cannot have an option 'name'"),
    ],
)
def test_a_class_that_is_no_proper_pass_is_refused_when_it_is_defined(body, message):
    with pytest.raises(ContractError, match=message):
        type(Pass)("Bad", (Pass,), body)


def test_every_pass_documents_every_option():
    own = {n: p for n, p in registered().items() if p.__module__.startswith("specqd.passes")}
    assert {"cast-mxfp4", "derive-draft", "fuse-linear", "fuse-rms-norm", "fuse-rope", "share-kv"} <= set(own)
    for name, kind in own.items():
        assert str(kind()) == name
        for option in options(kind):
            assert option.doc and option.choices, (name, option.name)


def test_options_say_what_they_take():
    by_name = {o.name: o for o in options(CastMXFP4)}
    assert by_name["scale"].choices == "floor | even | rceil | search"
    assert by_name["keep"].default == () and by_name["keep"].choices == "names joined by |"
    assert by_name["lm_head"].doc == "what becomes of the head."


def test_the_passes_need_neither_tvm_nor_transformers():
    script = (
        "import sys, specqd.passes\nspecqd.passes.registered()\n"
        "print(sorted({'tvm', 'transformers'} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_watchers_dump_time_and_tell(program, tmp_path):
    told, timing = [], Timing()
    Pipeline.parse("negate-twice, derive-draft")(
        program, dump_to(tmp_path / "graphs"), timing, diff(told.append)
    )
    assert sorted(p.name for p in (tmp_path / "graphs").iterdir()) == [
        "000-captured-target.txt", "001-negate-twice-target.txt", "002-derive-draft-draft.txt",
        "002-derive-draft-target.txt",
    ]  # fmt: skip
    assert "neg" in (tmp_path / "graphs" / "001-negate-twice-target.txt").read_text()
    assert list(timing.seconds) == ["negate-twice", "derive-draft"] and "negate-twice" in str(timing)
    assert told[0] == "negate-twice on target: 1 rewrites, 1 refusals, 5 -> 7 nodes"


def test_verify_catches_a_pass_that_lies(program):
    check = verify(torch.arange(6)[None])
    Pipeline.parse("negate-twice, derive-draft, draft: cast-mxfp4")(program, check)
    with pytest.raises(ContractError, match=r"step 2 \(add-one\) changed the logits of target by up to"):
        Pipeline.parse("negate-twice, add-one")(program, check)
    with pytest.raises(InputError, match=r"verify needs tokens of shape \[1, length\], not \[6\]"):
        verify(torch.arange(6))


def test_progress_is_told_and_counts_as_no_rewrite(program):
    told = []
    after = Pipeline.of(TakeLong())(program, tell=lambda *what: told.append(what))
    assert told == [("dawdling", 0, 2), ("dawdling", 1, 2)]
    assert (after.history[-1].rewritten, after.history[-1].refused) == ((), (("relu", "no hurry"),))
    assert TakeLong()(program).rewrites == 0
