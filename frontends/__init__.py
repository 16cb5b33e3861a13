"""Ways in: each turns a model from elsewhere into a Program; and back: artifacts in transformers' `generate`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .assisting import Assistant
    from .dispatch import capture
    from .generating import specqd_generate

__all__ = ["Assistant", "capture", "specqd_generate"]

_HOMES = {"Assistant": "assisting", "capture": "dispatch", "specqd_generate": "generating"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that `import specqd.frontends` stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
