"""Which passes there are: every subclass of Pass in a module of this package."""

from __future__ import annotations

import difflib
import importlib
import pkgutil

from specqd.errors import InputError

from .contract import Pass

__all__ = ["find", "registered"]


def registered() -> dict[str, type[Pass]]:
    """Return every pass by name, sorted; imports the package's modules the first time."""
    package = importlib.import_module("specqd.passes")
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
    return dict(sorted(Pass.registry.items()))


def find(name: str) -> type[Pass]:
    """Look a pass up by name; raises InputError listing the known ones."""
    known = Pass.registry if name in Pass.registry else registered()
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {close[0]}" if close else ""
        raise InputError(f"there is no pass {name!r}{hint}; the passes are {', '.join(known)}")
    return known[name]
