"""Sizes: from the symbolic integers of torch to those of TIR."""

from __future__ import annotations

import functools
import operator
from typing import Any

import sympy
import torch
from torch.utils._sympy import functions as sym
from torch.utils._sympy.symbol import SymT, symbol_is_type

from specqd.codegen.general.values import i64
from specqd.codegen.tir import tirx
from specqd.errors import CodegenError

__all__ = ["Sizes"]


class Sizes:
    """The dynamic sizes of a graph: a TIR variable for each symbol, and what it was in the example."""

    def __init__(self) -> None:
        """Start without symbols."""
        self.symbols: dict[str, Any] = {}
        self.hints: dict[str, int] = {}

    def __call__(self, size: Any) -> Any:
        """Return an int, or the TIR expression of a symbolic one.

        Raises:
            CodegenError: the size is only known once the data is, or is no expression of the inputs' sizes.
        """
        if isinstance(size, torch.SymInt):
            return self._of(size.node.expr)
        return int(size)

    def scalar(self, value: torch.SymFloat) -> Any:
        """Return the float64 TIR expression of a number computed from sizes."""
        return tirx.Cast("float64", i64(self._of(value.node.expr)))

    def hint(self, size: Any) -> int:
        """Return what a size was in the example; what cannot be told counts as 64."""
        if isinstance(size, int):
            return size
        from tvm.sym import Analyzer

        analyzer = Analyzer()
        for name, var in self.symbols.items():
            analyzer.bind(var, tirx.const(self.hints[name], "int64"))
        found = analyzer.simplify(size)
        return int(found.value) if hasattr(found, "value") else 64

    def declare(self, symbol: sympy.Symbol, hint: int) -> Any:
        """Return the TIR variable of a symbol, which is `hint` in the example."""
        name = str(symbol)
        if name not in self.symbols:
            self.symbols[name], self.hints[name] = tirx.Var(name, "int64"), hint
        return self.symbols[name]

    def _of(self, expr: Any) -> Any:
        if expr.is_Integer:
            return int(expr)
        if expr.is_Symbol:
            if symbol_is_type(expr, (SymT.UNBACKED_INT, SymT.UNBACKED_FLOAT)):
                raise CodegenError(f"the size {expr} depends on the data, which cannot be compiled")
            if str(expr) not in self.symbols:
                raise CodegenError(
                    f"no input has the dynamic size {expr} itself, only one computed from it, which is not compiled; "
                    "declare it as a Dim without factors and summands, or make it fixed"
                )
            return self.symbols[str(expr)]
        rule = _RULES.get(type(expr))
        if rule is None:
            raise CodegenError(f"the size {expr} is no expression of sizes that can be compiled")
        return rule(*(i64(self._of(arg)) for arg in expr.args))


def _power(base: Any, exponent: Any) -> Any:
    return functools.reduce(operator.mul, [base] * int(exponent.value))


_RULES = {
    sympy.Add: lambda *terms: functools.reduce(operator.add, terms),
    sympy.Mul: lambda *terms: functools.reduce(operator.mul, terms),
    sympy.Pow: _power,
    sym.PowByNatural: _power,
    sympy.Max: lambda *terms: functools.reduce(tirx.max, terms),
    sympy.Min: lambda *terms: functools.reduce(tirx.min, terms),
    sym.Max: lambda *terms: functools.reduce(tirx.max, terms),
    sym.Min: lambda *terms: functools.reduce(tirx.min, terms),
    sym.FloorDiv: tirx.floordiv,
    sym.CleanDiv: tirx.floordiv,
    sym.Mod: tirx.floormod,
    sym.PythonMod: tirx.floormod,
    sym.ModularIndexing: lambda x, by, of: tirx.floormod(tirx.floordiv(x, by), of),
}
