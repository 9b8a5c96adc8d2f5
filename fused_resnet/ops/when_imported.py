"""Calls a function once a module is imported, so that nobody has to import it for that."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_waiting: dict[str, list[Callable[[], None]]] = {}


def when_imported(module: str, call: Callable[[], None]) -> None:
    """Call a function after a module's first import, or now if it is imported already.

    Args:
        module: Full name of the module.
        call: The function.
    """
    if module in sys.modules:
        call()
        return
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    _waiting.setdefault(module, []).append(call)


class _Finder(MetaPathFinder):
    """Finds the modules that are waited for as they would be found without it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        calls = _waiting.pop(fullname, None)
        if calls is None:
            return None
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        spec.loader = _Loader(spec.loader, calls)
        return spec


class _Loader(Loader):
    """Executes a module as its own loader does, and then the functions that waited for it."""

    def __init__(self, loader: Any, calls: list[Callable[[], None]]) -> None:
        self.loader = loader
        self.calls = calls

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        for call in self.calls:
            call()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)
