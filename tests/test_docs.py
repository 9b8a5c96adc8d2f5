"""The documentation: it builds strictly without a network, and has every public name."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import fused_resnet as fr

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"

pytestmark = pytest.mark.skipif(
    not (ROOT / "mkdocs.yml").exists(), reason="the package is tested without its repository"
)


def extension(name: str, *needs: str) -> ModuleType:
    for need in needs:
        pytest.importorskip(need, reason=f"{need} is not installed (pip install -e '.[docs]')")
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / "site" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_is_in_the_reference() -> None:
    pages = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    named = re.findall(r"^::: (\S+)", pages, re.MULTILINE)
    documented = {name.rpartition(".")[2] for name in named}
    public = {*fr.__all__, *fr.ops.__all__, *fr.nn.__all__}
    modules = {"nn", "ops", "reference", "__version__"}
    assert public - documented - modules == set()


def test_every_page_is_in_the_menu() -> None:
    menu = re.findall(r"([\w./-]+\.md)", (ROOT / "mkdocs.yml").read_text())
    pages = [str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")]
    assert sorted(menu) == sorted(pages)


def test_make_installs_what_the_extra_names() -> None:
    extra = re.search(r"^docs = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    made = re.search(r"^DOCS_REQUIRES := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert extra is not None
    assert made is not None
    assert re.findall(r'"(.+?)"', extra[1]) == re.findall(r"'(.+?)'", made[1])


def test_roles_of_docstrings_become_markdown() -> None:
    rewritten = extension("roles", "griffe").rewritten
    assert rewritten("See :func:`fused_resnet.fuse`.") == "See `fused_resnet.fuse`."
    assert rewritten(":class:`Graphs <a.b.Graphs>` and :mod:`.trace`") == "`Graphs` and `trace`"
    assert rewritten(r"Scale :math:`\gamma`, ``(C,)``") == r"Scale \(\gamma\), ``(C,)``"
    block = "A pass.\n\n.. math:: y = \\max(0,\\;\n    x)\n\nIn training"
    assert rewritten(block) == "A pass.\n\n\\[ y = \\max(0,\\; x) \\]\n\n\nIn training"


def test_formulas_become_mathml() -> None:
    rewritten = extension("math", "latex2mathml").on_page_content
    inline = rewritten(r'<p>is <span class="arithmatex">\(a &lt; \gamma\)</span>.</p>')
    assert inline.startswith("<p>is <math")
    assert 'display="inline"' in inline
    block = rewritten('<div class="arithmatex">\\[\nx^2\n\\]</div>')
    assert block.startswith('<div class="formula"><math')
    assert rewritten("<p>no formula</p>") == "<p>no formula</p>"


@pytest.mark.thorough
def test_the_site_builds_strictly_and_fetches_nothing(tmp_path: Path) -> None:
    for need in ("material", "mkdocstrings_handlers.python", "latex2mathml"):
        pytest.importorskip(need, reason="mkdocs is not installed (pip install -e '.[docs]')")
    # Python's sockets are refused in the process that builds.
    code = (
        "import sys\n"
        "def refuse(event, _):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo'): sys.exit(event)\n"
        "sys.addaudithook(refuse)\n"
        "from mkdocs.__main__ import cli\n"
        f"cli(['build', '--strict', '--quiet', '--site-dir', {str(tmp_path / 'site')!r}])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        text = page.read_text()
        loaded = re.findall(r'<(?:script|img|iframe)[^>]* src="([^"]+)"', text)
        loaded += re.findall(r'<link[^>]* href="([^"]+)"', text)
        assert [url for url in loaded if "//" in url] == [], page.name
        assert "arithmatex" not in text, page.name
        assert "--8<--" not in text, page.name
        assert not re.search(r":(?:func|class|mod|math):", text), page.name
