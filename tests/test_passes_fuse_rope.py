import pytest
import torch
from small_programs import DIM, Decoder, logits, of, ops
from torch.testing import assert_close

from specqd.passes.fuse_rope import FuseRope

HEADS = 2
SIZE = DIM // HEADS


def angles(positions, size):
    frequencies = 0.5 ** torch.arange(size // 2)
    a = positions[..., None].float() * frequencies
    return torch.cat((a, a), dim=-1)


def rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def by_chunks(x):
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def by_split(x):
    a, b = x.split(x.shape[-1] // 2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def neighbours(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def decoder(turn, size=SIZE):
    """`turn(x, cos, sin)` applied to x `[1, HEADS, S, SIZE]`, with cos and sin spread over the heads."""

    def body(m, x, positions):
        heads = x.view(1, -1, HEADS, SIZE).transpose(1, 2)
        a = angles(positions, size)
        return turn(heads, a.cos().unsqueeze(1), a.sin().unsqueeze(1)).transpose(1, 2).flatten(2)

    return of(Decoder(body))


def partly(x, cos, sin):
    first, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat((first * cos + rotate_half(first) * sin, rest), dim=-1)


def apart(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[..., : SIZE // 2], sin[..., : SIZE // 2]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


ROTATIONS = {
    "slices": (lambda x, cos, sin: x * cos + rotate_half(x) * sin, SIZE),
    "chunks": (lambda x, cos, sin: x * cos + by_chunks(x) * sin, SIZE),
    "splits": (lambda x, cos, sin: x * cos + by_split(x) * sin, SIZE),
    "sine first": (lambda x, cos, sin: sin * rotate_half(x) + cos * x, SIZE),
    "equal values": (lambda x, cos, sin: (x + 1) * cos + rotate_half(x + 1) * sin, SIZE),
    "a part of the channels": (partly, 12),
}


@pytest.mark.parametrize(("turn", "size"), ROTATIONS.values(), ids=ROTATIONS)
def test_a_rotation_becomes_one_operator_with_the_same_bits(turn, size):
    program = decoder(turn, size)
    result = FuseRope()(program)
    assert result.rewrites == 1 and not result.refusals
    assert not {"aten.neg", "aten.slice", "aten.unsqueeze"} & set(ops(result.program)[8:])
    made = next(n for n in result.program.target.graph.nodes if n.name == "rope")
    assert [str(a) for a in made.args[1:]] == ["cos", "sin"]
    assert_close(logits(result.program), logits(program), rtol=0, atol=0)


def test_a_partial_rotation_takes_the_whole_head():
    result = FuseRope()(decoder(partly, 12))
    made = next(n for n in result.program.target.graph.nodes if n.name == "rope")
    assert str(made.args[0]) == "transpose"
    assert ops(result.program)[-4:] == ["specqd.rope", "aten.transpose", "aten.flatten", "aten.linear"]


def test_halves_apart_share_doubled_angles():
    def turn(x, cos, sin):
        return apart(x, cos, sin) + apart(x * 2, cos, sin)

    def body(m, x, positions):
        heads = x.view(1, -1, HEADS, SIZE).transpose(1, 2)
        a = positions[..., None].float() * 0.5 ** torch.arange(SIZE // 2)
        cos, sin = a.cos().unsqueeze(1), a.sin().unsqueeze(1)
        return turn(heads, cos, sin).transpose(1, 2).flatten(2)

    program = of(Decoder(body))
    result = FuseRope()(program)
    assert result.rewrites == 2 and not result.refusals
    assert ops(result.program).count("aten.cat") == 2
    assert_close(logits(result.program), logits(program), rtol=0, atol=0)


REFUSED = {
    "neighbours (Cohere)": (
        lambda x, cos, sin: x * cos + neighbours(x) * sin,
        "it rotates neighbouring channels, not halves (interleaved layout)",
    ),
    "halves in place": (
        lambda x, cos, sin: x * cos + torch.cat((-x[..., : SIZE // 2], x[..., SIZE // 2 :]), -1) * sin,
        "cat_1 does not swap the halves of transpose",
    ),
    "a negation alone": (
        lambda x, cos, sin: (-x) * cos,
        "it is not joined with the other half of the same channels",
    ),
    "no cosine": (
        lambda x, cos, sin: x + rotate_half(x) * sin,
        "cat_1 is not multiplied by a sine and added to transpose times a cosine",
    ),
    "angles of another rank": (
        lambda x, cos, sin: x * cos[0] + rotate_half(x) * sin[0],
        "cosine and sine are not [batch, positions, channels] spread over the heads of transpose",
    ),
}


@pytest.mark.parametrize(("turn", "why"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_such_rotation_is_left_alone_and_said_so(turn, why):
    program = decoder(turn)
    result = FuseRope()(program)
    assert result.rewrites == 0
    assert [r.why for r in result.refusals] == [why]
    assert ops(result.program) == ops(program)


def test_a_second_run_rewrites_nothing():
    once = FuseRope()(decoder(partly, 12)).program
    assert FuseRope()(once).rewrites == 0
