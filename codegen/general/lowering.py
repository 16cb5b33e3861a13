"""Lowering: the Relax function that is being written, and the kernels that it calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx
from tvm import relax
from tvm.script.ir_builder import IRBuilder

from specqd.codegen.dense_kernels import ConvSpec, GemmSpec, Schedule
from specqd.codegen.dense_kernels.layout import block
from specqd.codegen.dense_kernels.spec import PER_WORD, Requantise
from specqd.codegen.general.elementwise import write
from specqd.codegen.general.factors import Factors
from specqd.codegen.general.kernel import Kernel, Reader
from specqd.codegen.general.sizes import Sizes
from specqd.codegen.general.values import Constant, Tensor, Value, array, i64, product, stored, zero
from specqd.codegen.isa import ISA
from specqd.codegen.tir import I
from specqd.manifest import KernelCall
from specqd.program import module_of

__all__ = ["End", "Lowering", "Schedules"]

Schedules = Callable[[ConvSpec | GemmSpec], Schedule | None]

#: operations an element that are computed again rather than kept, where several read a value
CHEAP = 1


@dataclass(frozen=True)
class End:
    """What is done to the sums of a product: a residual of its shape is added, then there is an activation.

    Attributes:
        dtype: of the result, and of the residual.
        requantise: how an integer result is made.
        summand: how an integer residual was made.
    """

    residual: Value | None = None
    activation: str | None = None
    dtype: str = "float32"
    requantise: Requantise = field(default_factory=Requantise)
    summand: Requantise | None = None


class Lowering:
    """What operators lower themselves with: tensors, kernels, constants."""

    def __init__(
        self, isa: ISA, sizes: Sizes, builder: relax.BlockBuilder, schedules: Schedules = lambda spec: None
    ) -> None:
        """Start with a Relax function open in `builder`; `schedules` chooses how a kernel is cut, None: by itself."""
        self.isa, self.sizes, self.builder, self.schedules = isa, sizes, builder, schedules
        self.reader: Reader = Reader()
        self.endings: Callable[..., End] = lambda node, through_views, dtype: End()
        self.factors: Callable[[fx.Node, fx.Node, int, Factors], Factors]
        self.parameters: dict[str, tuple[Value, Callable[[], np.ndarray]]] = {}
        self.node: fx.Node | None = None
        self.calls: list[KernelCall] = []

    def tensor(self, var: Any, shape: Sequence[Any], dtype: str, *, given: bool = False) -> Value:
        """Return the value of a Relax variable."""
        tensor = Tensor(var, tuple(shape), dtype, given)
        return Value(tensor.shape, dtype, lambda index: self.reader.read(tensor, index), tensor)

    def constant(self, name: str, data: torch.Tensor) -> Value:
        """Return the value of a weight, or of what can be computed from weights alone."""
        dtype = str(data.dtype).removeprefix("torch.")

        def at(index: Any) -> Any:
            return self.parameter(name, data.shape, dtype, lambda: array(data)).at(index)

        data = data.detach().contiguous()
        return Value(tuple(data.shape), dtype, at, data=Constant(name, data, self.constant))

    def parameter(self, name: str, shape: Sequence[int], dtype: str, make: Callable[[], np.ndarray]) -> Value:
        """Return the value of a parameter of the function; `make` gives it when the artifact is written."""
        if name not in self.parameters:
            var = relax.Var(
                f"weight_{len(self.parameters)}", relax.TensorType(list(map(i64, shape)), stored(dtype))
            )
            self.parameters[name] = (self.tensor(var, shape, dtype, given=True), make)
        return self.parameters[name][0]

    def stored(
        self, value: Value, form: str, change: Callable[[np.ndarray], np.ndarray], shape: Any
    ) -> Value | None:
        """Return a constant in another form, which it gets when the artifact is written; None for no constant."""
        if value.data is None:
            return None
        data = value.data.contents
        return self.parameter(f"{value.data.name}:{form}", shape, value.dtype, lambda: change(array(data)))

    def launch(
        self,
        name: str,
        outputs: Sequence[tuple[Sequence[Any], str]],
        write: Callable[..., None],
        flops: int = 0,
    ) -> list[Value]:
        """Call a new kernel: `write(kernel, *buffers)` emits what fills its outputs, of these shapes and dtypes."""
        kernel = Kernel(self.isa, self.sizes.hint)
        with self._reading(kernel), IRBuilder() as builder, I.sblock("root"), self._prelude():
            write(kernel, *(kernel.output(shape, dtype) for shape, dtype in outputs))
        symbols = list(self.sizes.symbols.values())
        function, used = kernel.function(builder.get(), symbols)
        types = [relax.TensorType(list(map(i64, shape)), stored(dtype)) for shape, dtype in outputs]
        target = self._added(function, name, flops)
        arguments = [*(tensor.var for tensor in kernel.inputs), *used]
        call = self.builder.emit(
            relax.call_tir(target, arguments, out_ty=types if len(types) > 1 else types[0])
        )
        parts = (
            [call]
            if len(types) == 1
            else [self.builder.emit(relax.TupleGetItem(call, i)) for i in range(len(types))]
        )
        return [self.tensor(v, shape, dtype) for v, (shape, dtype) in zip(parts, outputs, strict=True)]

    def end(self, node: fx.Node, *, through_views: bool, dtype: str) -> End:
        """Take what follows a product into its kernel; see specqd.codegen.general.ending."""
        return self.endings(node, through_views, dtype)

    def call(
        self,
        name: str,
        function: Any,
        given: Sequence[Value],
        shape: Sequence[Any],
        dtype: str,
        flops: int = 0,
    ) -> Value:
        """Call a kernel that is written already: from tensors to one tensor."""
        target = self._added(function, name, flops)
        kind = relax.TensorType(list(map(i64, shape)), stored(dtype))
        arguments = [value.tensor.var for value in given if value.tensor is not None]
        return self.tensor(self.builder.emit(relax.call_tir(target, arguments, out_ty=kind)), shape, dtype)

    def _added(self, function: Any, name: str, flops: int) -> Any:
        """Add a function and note that it is called for the operator that is being lowered."""
        target = self.builder.add_func(function, name)
        operator, module = ("", "") if self.node is None else (str(self.node.target), module_of(self.node))
        call = KernelCall(function=target.name_hint, operator=operator, module=module, flops=flops)
        self.calls.append(call)
        return target

    def settle(self, value: Value, *, copy: bool = False) -> Value:
        """Compute a value into a tensor of its own; one that is a tensor stays as it is, unless it is to be a copy."""
        if value.data is not None and not copy:
            data = value.data.contents
            return self.parameter(value.data.name, data.shape, value.dtype, lambda: array(data))
        if value.tensor is not None and not copy:
            return value
        deep = value.blocks if value.dtype in PER_WORD else None  # no kernel reads blocks of other dtypes
        if deep is not None and deep.shape[-1] == block(value.shape[1], value.dtype):
            from specqd.codegen.general.kernels import planes

            return planes(self, value)
        kind = (value.shape, value.dtype)
        return self.launch("elementwise", [kind], lambda kernel, out: write(self, kernel, out, value))[0]

    def ready(self, value: Value) -> Value:
        """Return a value whose elements may be read several times."""
        if value.blocks is not None and value.cost > CHEAP:
            from specqd.codegen.general.kernels import blocked

            return blocked(self.settle(value.blocks), value.shape)
        return value if value.cost <= CHEAP else self.settle(value)

    def reshape(self, value: Value, shape: Sequence[Any]) -> Value:
        """See a tensor in another shape of as many elements, in row-major order."""
        if value.data is not None:
            return value.data.changed(f"{tuple(shape)}", value.data.contents.reshape(tuple(shape)))
        if 0 in shape:  # Relax takes a size of zero for one that it is to find out
            return Value(tuple(shape), value.dtype, lambda _: zero(value.dtype))
        source = self.settle(value)
        if source.tensor is None or tuple(shape) == source.shape:
            return source
        var = self.builder.emit(relax.op.reshape(source.tensor.var, relax.ShapeExpr(list(map(i64, shape)))))
        return self.tensor(var, shape, value.dtype, given=source.tensor.given)

    def unsqueezed(self, value: Value) -> Value:
        """Put a dimension of one element in front."""
        shape = (1, *value.shape)
        if value.tensor is not None or value.data is not None:
            return self.reshape(value, shape)
        return value.view(shape, lambda index: value.at(index[1:]))

    def work(self, *sizes: Any) -> int:
        """Multiply sizes as they were in the example."""
        return self.sizes.hint(product(sizes))

    @contextmanager
    def _reading(self, reader: Reader) -> Any:
        before, self.reader = self.reader, reader
        try:
            yield reader
        finally:
            self.reader = before

    def probe(self, emit: Callable[[], Any]) -> tuple[Any, list[Any]]:
        """Return the statements that `emit` emits, without a kernel, and the positions that it reads."""
        reader = Reader()
        with self._reading(reader), IRBuilder() as builder, I.sblock("root"):
            emit()
        return builder.get(), reader.reads

    def _prelude(self) -> Any:
        return I.attr(0, "pragma_import_llvm", self.isa.prelude) if self.isa.prelude else nullcontext()
