"""fuse-rope: one operator for rotary position embedding."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from specqd.program import Entry, Program

from .contract import Pass, Refusal
from .match import Part, arguments, calls, only_user, part, same, shapes
from .rewrite import replace

__all__ = ["FuseRope"]

aten = torch.ops.aten
_Shapes = dict[fx.Node, torch.Size]


class FuseRope(Pass):
    """Fuse the rotation of the two halves of a head's channels (RoFormer, in the layout of transformers).

        half = cat(-x[..., R/2:], x[..., :R/2])
        x * unsqueeze(cos, 1) + half * unsqueeze(sin, 1)  ->  rope(x, cos, sin)

    with x [B, H, S, R] and cos, sin [B, S, R].

    1. All channels turn: as above. Halves may be slices, chunks or parts of a split; sums and products match
       in either order; x may be several equal nodes.
    2. Only the first R of D turn, x is t[..., :R] and the rest follows:
       cat(case 1, t[..., R:])  ->  rope(t, cos, sin).
    3. Each half on its own, a = x[..., :R/2] and b = x[..., R/2:], cos and sin of R/2 channels (GPT-OSS):
       cat(a * cos - b * sin, b * cos + a * sin)  ->  rope(x, cat(cos, cos), cat(sin, sin)).

    Refused: a rotation of neighbouring channels (Cohere), any negated value that begins no such rotation, and
    a difference of products joined with a sum of products that is not case 3.
    """

    name = "fuse-rope"

    def run(self, program: Program, entry: Entry) -> Iterator[fx.Node | Refusal]:
        """Try each negation, which cases 1 and 2 have, and each cat that looks like case 3."""
        starts = [n for n in entry.graph.nodes if calls(n, aten.neg) or _apart(n)]
        known = shapes(program, entry) if starts else {}
        doubled: dict[fx.Node, fx.Node] = {}
        for node in starts:
            found = _match(node, known) if calls(node, aten.neg) else _match_halves(node, known)
            if isinstance(found, str):
                yield Refusal(node.name, found)
                continue
            last, x, cos, sin = found
            if not calls(node, aten.neg):
                cos, sin = (_doubled(angles, last, doubled) for angles in (cos, sin))
            new = replace(last, torch.ops.specqd.rope.default, (x, cos, sin))
            known[new] = known[last]
            yield new


def _match(neg: fx.Node, known: _Shapes) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node] | str:
    """Return the node to replace, x, cos and sin; or what is missing."""
    if only_user(neg, aten.stack):
        return "it rotates neighbouring channels, not halves (interleaved layout)"
    turned, upper = only_user(neg, aten.cat), part(neg.args[0], known)
    joined = list(turned.args[0]) if turned else []
    lower = part(joined[1], known) if len(joined) == 2 and joined[0] is neg else None
    if turned is None or upper is None or lower is None:
        return "it is not joined with the other half of the same channels"
    x, size = upper.whole, known[upper.whole][-1]
    if not same(lower.whole, x) or not _are_halves(lower, upper, size) or not _joins_last(turned, known):
        return f"{turned} does not swap the halves of {x}"
    by_sin = only_user(turned, aten.mul)
    total = only_user(by_sin, aten.add) if by_sin else None
    by_cos = _other(total, by_sin) if total and by_sin else None
    cosine = _cofactor(by_cos, x)
    if by_sin is None or total is None or by_cos is None or cosine is None:
        return f"{turned} is not multiplied by a sine and added to {x} times a cosine"
    if arguments(total)["alpha"] != 1 or len(by_cos.users) != 1:
        return f"{by_cos} is scaled or also used elsewhere"
    cos, sin = (_angles(factor, known[x], size, known) for factor in (cosine, _other(by_sin, turned)))
    if cos is None or sin is None:
        return f"cosine and sine are not [batch, positions, channels] spread over the heads of {x}"
    partial = _with_the_rest(total, x, known)
    return (*partial, cos, sin) if partial else (total, x, cos, sin)


def _apart(node: fx.Node) -> bool:
    """Say whether a node is a cat of a difference and a sum, each of two products, as in case 3."""
    joined = list(node.args[0]) if calls(node, aten.cat) else []
    if len(joined) != 2 or not calls(joined[0], aten.sub) or not calls(joined[1], aten.add):
        return False
    plain = all(arguments(half)["alpha"] == 1 for half in joined)
    return plain and all(calls(product, aten.mul) for half in joined for product in half.args[:2])


def _match_halves(cat: fx.Node, known: _Shapes) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node] | str:
    """Return the node to replace, x, and cos and sin of half the channels; or what is missing."""
    difference, total = cat.args[0]
    a_cos, b_sin = difference.args[:2]
    lower, upper = (next((p for n in m.args if (p := part(n, known))), None) for m in (a_cos, b_sin))
    if lower is None or upper is None or lower.whole is not upper.whole or not _joins_last(cat, known):
        return f"{difference} and {total} are not made of two halves of one value"
    x, size = lower.whole, known[lower.whole][-1]
    a, b = (next(n for n in m.args if part(n, known)) for m in (a_cos, b_sin))
    cosine, sine = _cofactor(a_cos, a), _cofactor(b_sin, b)
    first, second = total.args[:2]
    sums = [(_cofactor(p, b), _cofactor(q, a)) for p, q in ((first, second), (second, first))]
    if not _are_halves(lower, upper, size) or (cosine, sine) not in sums:
        return f"{difference} and {total} do not rotate the halves of {x}"
    cos, sin = (_angles(factor, known[x], size // 2, known) for factor in (cosine, sine))
    if cos is None or sin is None:
        return f"cosine and sine are not [batch, positions, channels] spread over the heads of {x}"
    return cat, x, cos, sin


def _doubled(angles: fx.Node, user: fx.Node, made: dict[fx.Node, fx.Node]) -> fx.Node:
    if angles not in made:
        with user.graph.inserting_after(angles):
            made[angles] = user.graph.create_node("call_function", aten.cat.default, ([angles, angles], -1))
    return made[angles]


def _are_halves(lower: Part, upper: Part, size: int) -> bool:
    return (lower.start, lower.end) == (0, size // 2) and (upper.start, upper.end) == (size // 2, size)


def _angles(node: fx.Node | None, x: torch.Size, size: int, known: _Shapes) -> fx.Node | None:
    """Return [B, S, size] of which the factor [B, 1, S, size] of x [B, H, S, D] is an unsqueeze."""
    if node is None or not calls(node, aten.unsqueeze) or node.args[1] not in (1, -3) or len(x) != 4:
        return None
    angles: fx.Node = node.args[0]
    return angles if known[angles][1:] == (x[2], size) else None


def _with_the_rest(total: fx.Node, x: fx.Node, known: _Shapes) -> tuple[fx.Node, fx.Node] | None:
    """Return the cat and the tensor of case 2."""
    cat, first = only_user(total, aten.cat), part(x, known)
    joined = list(cat.args[0]) if cat else []
    rest = part(joined[1], known) if len(joined) == 2 and joined[0] is total else None
    if cat is None or first is None or rest is None or not _joins_last(cat, known):
        return None
    whole, follows = first.whole, (rest.start, rest.end) == (first.end, known[first.whole][-1])
    return (cat, whole) if follows and first.start == 0 and same(whole, rest.whole) else None


def _joins_last(cat: fx.Node, known: _Shapes) -> bool:
    return arguments(cat)["dim"] in (-1, len(known[cat]) - 1)


def _other(node: fx.Node, one: fx.Node) -> fx.Node:
    a, b = node.args[:2]
    return b if a is one else a


def _cofactor(product: object, factor: fx.Node) -> fx.Node | None:
    """Return what a product multiplies `factor` by."""
    if not isinstance(product, fx.Node) or not calls(product, aten.mul):
        return None
    a, b = product.args
    return b if same(a, factor) else a if same(b, factor) else None
