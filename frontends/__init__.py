"""Ways in: each turns a model from elsewhere into a Program."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .huggingface import capture

__all__ = ["capture"]


def __getattr__(name: str) -> Any:
    """Import a way in when it is first asked for, so that `import specqd.frontends` stays light."""
    if name == "capture":
        from .huggingface import capture

        return capture
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
