import pytest
import torch
from small_programs import DIM, Decoder, logits, of, ops
from torch import nn
from torch.testing import assert_close

from specqd.errors import InputError
from specqd.passes.quantize import int8, mxfp4
from specqd.passes.quantize.cast_mxfp4 import CastMXFP4

DOWN = 40  # no multiple of 32


def mlp(m, x, _):
    return m.down(torch.relu(m.up(x))) + m.odd(m.narrow(x))


def decoder(tied=False):
    parts = {"up": nn.Linear(DIM, 2 * DIM), "down": nn.Linear(2 * DIM, DIM, bias=False)}
    model = Decoder(mlp, **parts, narrow=nn.Linear(DIM, DOWN), odd=nn.Linear(DOWN, DIM))
    model = model.bfloat16().float()  # what a BF16 checkpoint holds
    if tied:
        model.lm_head.weight = model.embed.weight
    return of(model)


def fake_quantised(program, lm_head, rule):
    """The same program with weights replaced by what the codecs make of them."""
    expected = program.copy()
    for name in ("up.weight", "down.weight", "narrow.weight"):
        expected.weights[name] = mxfp4.decode(*mxfp4.encode(program.weights[name], rule))
    head = program.weights["lm_head.weight"]
    if lm_head == "int8":
        expected.weights["lm_head.weight"] = int8.decode(*int8.encode(head))
    if lm_head == "mxfp4":
        expected.weights["lm_head.weight"] = mxfp4.decode(*mxfp4.encode(head, rule))
    return expected


@pytest.mark.parametrize("lm_head", ["keep", "int8", "mxfp4"])
@pytest.mark.parametrize("scale", mxfp4.SCALE_RULES)
def test_logits_are_those_of_the_decoded_weights(scale, lm_head):
    program = decoder()
    after = CastMXFP4(scale=scale, lm_head=lm_head)(program).program
    # The same products of the same numbers in the same order.
    assert_close(logits(after), logits(fake_quantised(program, lm_head, scale)), rtol=1e-6, atol=1e-6)


def test_operators_and_weights_before_and_after():
    program = decoder()
    result = CastMXFP4()(program)
    assert ops(program) == [
        "aten.embedding", "aten.linear", "aten.relu", "aten.linear", "aten.linear", "aten.linear", "aten.add",
        "aten.linear",
    ]  # fmt: skip
    assert ops(result.program) == [
        "aten.embedding", "specqd.linear_mxfp4", "aten.relu", "specqd.linear_mxfp4", "specqd.linear_mxfp4",
        "aten.linear", "aten.add", "specqd.linear_int8",
    ]  # fmt: skip
    after = result.program
    after.drop_unused_weights()
    assert after.weights["up.weight.mxfp4_blocks"].shape == (2 * DIM, DIM // 2)
    assert after.weights["up.weight.mxfp4_scales"].shape == (2 * DIM, DIM // 32)
    assert after.weights["lm_head.weight.int8_values"].dtype == torch.int8
    assert after.weights["lm_head.weight.int8_scales"].dtype == torch.float32
    assert "up.weight" not in after.weights and "up.bias" in after.weights


def test_a_row_that_is_no_multiple_of_32_is_refused():
    refusals = CastMXFP4()(decoder()).refusals
    assert [r.why for r in refusals] == ["its input has 40 channels, not a multiple of 32"]


def test_what_the_user_keeps_is_kept():
    result = CastMXFP4(lm_head="keep", keep=("up.*", "*row.weight"))(decoder())
    assert [r.why for r in result.refusals] == [
        "kept: up.weight matches up.*",
        "kept: narrow.weight matches *row.weight",
        "its input has 40 channels, not a multiple of 32",
        "kept: it is the head, and lm_head=keep",
    ]
    assert result.rewrites == 1


def test_a_tied_embedding_keeps_its_own_weight():
    after = CastMXFP4()(decoder(tied=True)).program
    after.drop_unused_weights()
    embedding = next(n for n in after.target.graph.nodes if n.name == "embedding")
    assert after.weights[str(embedding.args[0].target)].dtype == torch.float32
    assert sum(name.endswith("int8_values") for name in after.weights) == 1


def test_products_that_are_no_linears_are_refused():
    def body(m, x, _):
        return x @ x.transpose(1, 2) @ x + torch.addmm(m.b, x[0], m.w)[None]

    program = of(Decoder(body, b=torch.zeros(DIM), w=torch.eye(DIM)))
    assert [r.why for r in CastMXFP4(lm_head="keep")(program).refusals] == [
        "it is a product of two activations or of gathered weights, not a linear",
        "it is a product of two activations or of gathered weights, not a linear",
        "its weight is stored as [inputs, outputs]; put conv1d-to-linear first",
        "kept: it is the head, and lm_head=keep",
    ]


def test_integers_and_computed_weights_are_refused():
    def body(m, x, _):
        return m.up(x) + torch.nn.functional.linear(x, m.up.weight + 1)

    program = of(Decoder(body, up=nn.Linear(DIM, DIM)))
    program.weights["up.weight"] = program.weights["up.weight"].to(torch.int8)
    assert [r.why for r in CastMXFP4()(program).refusals] == [
        "its weight up.weight is torch.int8, not a float",
        "its weight is computed, not stored",
    ]


def test_a_second_cast_changes_nothing_and_says_so():
    once = CastMXFP4()(decoder()).program
    again = CastMXFP4()(once)
    assert again.rewrites == 0 and ops(again.program) == ops(once)
    assert next(r.why for r in again.refusals) == "cast already: specqd.linear_mxfp4.default"


def test_two_casts_of_one_weight_live_side_by_side():
    from specqd.passes.speculate.derive import DeriveDraft

    program = decoder()
    rule = {"a": "floor", "b": "rceil", "c": "floor"}
    for entry, scale in rule.items():
        program = DeriveDraft(entry=entry)(program).program
        program = CastMXFP4(scale=scale)(program, entry).program
    stored = [name for name in program.weights if name.startswith("up.weight.mxfp4_blocks")]
    assert stored == ["up.weight.mxfp4_blocks", "up.weight.mxfp4_blocks~2"]
    assert program.used_weights("a") == program.used_weights("c") != program.used_weights("b")


def test_a_scale_rule_that_does_not_exist_is_an_error_that_lists_them():
    with pytest.raises(
        InputError, match=r"option scale: 'best' is not one of floor \| even \| rceil \| search"
    ):
        CastMXFP4(scale="best")
