"""From a Program to machine code, through TVM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specqd.codegen.library import build as build

__all__ = ["build"]


def __getattr__(name: str) -> Any:
    """Import `build` when it is first used, so that importing specqd.codegen does not load TVM."""
    if name == "build":
        from specqd.codegen.library import build

        return build
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
