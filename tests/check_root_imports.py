"""Nothing below the package's root imports the root: `make lint` runs this and prints what does.

The root imports the whole package, so a module that imports it depends on every layer.
import-linter can't see that: to it the extension is no module, and ``from .. import _C`` is an
import of the root. The command and the workbench call the public functions, and are above them.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "fused_resnet"
#: The extension, which is built before any module is imported.
ALLOWED = {"_C"}
#: Folders above all that the root imports.
ABOVE = {"bench", "cli", "verify"}


def _names(tree: ast.Module, parents: list[str]) -> Iterator[tuple[int, str]]:
    """Line and text of the imports of the root, in a module of the package ``parents``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                whole = name.name == PACKAGE
                if whole or (name.name.startswith(f"{PACKAGE}.") and name.asname is None):
                    yield node.lineno, f"import {name.name}"  # both bind the root
        elif isinstance(node, ast.ImportFrom):
            above = parents[: len(parents) - node.level + 1] if node.level else []
            source = ".".join([*above, node.module] if node.module else above)
            if source == PACKAGE:
                yield from ((node.lineno, name.name) for name in node.names)


def imports_of_root(root: Path) -> list[str]:
    """The imports of the root that are not allowed: file, line and what is imported."""
    package, found = root / PACKAGE, []
    for path in sorted(package.rglob("*.py")):
        inside = path.relative_to(package)
        if inside.parts[0] in ABOVE:
            continue
        for line, name in _names(ast.parse(path.read_text()), [PACKAGE, *inside.parts[:-1]]):
            module = (package / f"{name}.py").exists() or (package / name / "__init__.py").exists()
            if name not in ALLOWED and not module:
                found.append(f"{path.relative_to(root)}:{line}: {name}")
    return found


def main() -> int:
    found = imports_of_root(ROOT)
    for line in found:
        print(f"{line}: from the package's root; import it from the module that defines it")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
