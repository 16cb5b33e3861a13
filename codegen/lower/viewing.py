"""aten's view operators, by name, in terms of `views`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from specqd.codegen.lower import views
from specqd.codegen.lower.values import Index, Value, constant
from specqd.codegen.tir import i32, tirx
from specqd.errors import CodegenError

__all__ = ["VIEWS"]

aten = torch.ops.aten


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _reshape(f: Any, node: fx.Node) -> Value:
    return views.reshape(f.space, f.argument(node.args[0]), _shape(node))


def _transpose(f: Any, node: fx.Node) -> Value:
    value = f.argument(node.args[0])
    order = list(range(len(value.shape)))
    a, b = (d % len(order) for d in node.args[1:3])
    order[a], order[b] = order[b], order[a]
    return views.permute(value, order)


def _t(f: Any, node: fx.Node) -> Value:
    return views.permute(f.argument(node.args[0]), [1, 0])


def _permute(f: Any, node: fx.Node) -> Value:
    return views.permute(f.argument(node.args[0]), node.args[1])


def _slice(f: Any, node: fx.Node) -> Value:
    value = f.argument(node.args[0])
    dim, start, end, step = (
        f.argument(a) for a in (node.args[1:] + (0, None, None, 1)[len(node.args) - 1 :])
    )
    dim %= len(value.shape)
    first, _, stride = slice(start, end, step).indices(value.shape[dim])
    return views.slice_(f.space, value, dim, first, _shape(node)[dim], stride)


def _select(f: Any, node: fx.Node) -> Value:
    return views.select(f.space, f.argument(node.args[0]), f.argument(node.args[1]), f.argument(node.args[2]))


def _expand(f: Any, node: fx.Node) -> Value:
    return views.broadcast(f.argument(node.args[0]), _shape(node))


def _cat(f: Any, node: fx.Node) -> Value:
    dim = node.args[1] if len(node.args) > 1 else 0
    return views.concatenate(f.space, f.argument(node.args[0]), dim)


def _stack(f: Any, node: fx.Node) -> Value:
    parts = f.argument(node.args[0])
    dim = (node.args[1] if len(node.args) > 1 else 0) % len(_shape(node))
    one = [views.reshape(f.space, p, [*p.shape[:dim], 1, *p.shape[dim:]]) for p in parts]
    return views.concatenate(f.space, one, dim)


def _parts(f: Any, node: fx.Node) -> list[Value]:
    value, sizes = f.argument(node.args[0]), node.meta["val"]
    dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0) % len(value.shape)
    starts = [sum(s.shape[dim] for s in sizes[:i]) for i in range(len(sizes))]
    return [views.slice_(f.space, value, dim, a, s.shape[dim]) for a, s in zip(starts, sizes, strict=True)]


def _unbind(f: Any, node: fx.Node) -> list[Value]:
    value = f.argument(node.args[0])
    dim = node.args[1] if len(node.args) > 1 else 0
    return [views.select(f.space, value, dim, i) for i in range(value.shape[dim % len(value.shape)])]


def _repeat_interleave(f: Any, node: fx.Node) -> Value:
    value, times = f.argument(node.args[0]), node.args[1]
    dim = (node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)) % len(value.shape)

    def at(index: Index) -> Any:
        source = f.space.simplify(tirx.floordiv(index[dim], i32(times)))
        return value.at([*index[:dim], source, *index[dim + 1 :]])

    return Value(_shape(node), value.dtype, at, vectorises=value.vectorises and dim != len(value.shape) - 1)


def _slice_scatter(f: Any, node: fx.Node) -> Value:
    whole, part = (f.argument(a) for a in node.args[:2])
    given: tuple[Any, ...] = tuple(node.args[2:])
    dim, start, end, step = given + (0, None, None, 1)[len(given) :]
    size = whole.shape[dim]
    first, last, stride = slice(f.argument(start), f.argument(end), step).indices(size)
    if stride != 1:
        raise CodegenError(f"writing every {stride}-th element is not supported, only neighbouring ones")
    before, after = (views.slice_(f.space, whole, dim, a, n) for a, n in ((0, first), (last, size - last)))
    return views.concatenate(f.space, [v for v in (before, part, after) if v.shape[dim]], dim)


def _copy(f: Any, node: fx.Node) -> Value:
    return views.broadcast(f.argument(node.args[1]), _shape(node))


def _empty(_: Any, node: fx.Node) -> Value:
    return constant(0, "float32" if node.meta["val"].is_floating_point() else "int32", _shape(node))


def _same(f: Any, node: fx.Node) -> Value:
    return f.argument(node.args[0])


def _cast(f: Any, node: fx.Node) -> Value:
    value = f.argument(node.args[0])
    dtype = "float32" if node.meta["val"].dtype == torch.float32 else "int32"
    if value.dtype == dtype:
        return value
    return value.with_at(value.shape, lambda i: tirx.Cast(dtype, value.at(i)), dtype=dtype)


#: operator -> function(lowering, node) giving a value (or the list of them) that owns no memory
VIEWS: dict[Any, Callable[[Any, fx.Node], Any]] = {
    aten.reshape.default: _reshape,
    aten.view.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.view_as.default: _reshape,
    aten.unsqueeze.default: _reshape,
    aten.squeeze.dim: _reshape,
    aten.squeeze.default: _reshape,
    aten.flatten.using_ints: _reshape,
    aten.unflatten.int: _reshape,
    aten.transpose.int: _transpose,
    aten.t.default: _t,
    aten.permute.default: _permute,
    aten.slice.Tensor: _slice,
    aten.slice_scatter.default: _slice_scatter,
    aten.copy.default: _copy,
    aten.new_empty.default: _empty,
    aten.select.int: _select,
    aten.expand.default: _expand,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.split.Tensor: _parts,
    aten.split_with_sizes.default: _parts,
    aten.chunk.default: _parts,
    aten.unbind.int: _unbind,
    aten.repeat_interleave.self_int: _repeat_interleave,
    aten.to.dtype: _cast,
    aten._to_copy.default: _cast,
    aten.alias.default: _same,
    aten.detach.default: _same,
}
