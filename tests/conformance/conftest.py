"""One test for all backends: the ``backend`` fixture, and which values each backend is given.

A test that takes ``backend`` runs on all of them, or on those that ``@on(...)`` names. With
``dtype`` or ``precision`` among its arguments it runs for each of the backend's own; under
``@rows`` (tests/conformance/marks.py) for a covering set.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from backends import NAMES, Backend, Cpu, Gpu, Interpreted, Simulator, kinds
from covering import covering, labelled

import fused_resnet as fr

#: Cases that cost an emulation seconds each and take no way of their own through its kernels.
SLOW = {"interpreter": {"many-blocks", "wide-contiguous", "whole"}, "simulator": set()}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" not in metafunc.fixturenames:
        return
    on = metafunc.definition.get_closest_marker("on")
    rows = metafunc.definition.get_closest_marker("rows")
    own = [name for name in ("dtype", "precision") if name in metafunc.fixturenames]
    names, params = ["backend", *own], []
    if rows:
        names += [*rows.kwargs["every"], *rows.kwargs["spread"]]
    for backend in on.args if on else NAMES:
        for row in _rows(metafunc, backend, own, rows):
            label = "-".join([backend, *(text for text, _ in row.values())])
            marks = [] if backend == "cpu" else [pytest.mark.thorough]
            if any(word in label for word in SLOW.get(backend, ())):
                marks.append(pytest.mark.slow)
            values = [value for _, value in row.values()]
            params.append(pytest.param(backend, *values, id=label, marks=marks))
    metafunc.parametrize(names, params, indirect=["backend"])


def _rows(
    metafunc: pytest.Metafunc, backend: str, own: list[str], rows: pytest.Mark | None
) -> list[dict[str, Any]]:
    """Values with their labels, the backend's own first."""
    only = metafunc.definition.get_closest_marker("precisions")
    groups = {}
    for name in own:
        groups[name] = [
            [value for value in kind if only is None or str(value) in only.args]
            for kind in kinds(backend, name)
        ]
        groups[name] = [kind for kind in groups[name] if kind]
    if rows is None:
        every = {name: labelled(v for kind in groups[name] for v in kind) for name in own}
        return covering(every, {})
    every = {name: labelled(values) for name, values in rows.kwargs["every"].items()}
    spread = {name: labelled(values) for name, values in rows.kwargs["spread"].items()}
    turns = {id(kind): itertools.cycle(labelled(kind)) for name in own for kind in groups[name]}
    return [
        {
            **{name: next(turns[id(row[name])]) for name in own},
            **{name: row[name] for name in (*every, *spread)},
        }
        for row in covering(every, {**groups, **spread})
    ]


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The backend's operators. Memory that no kernel wrote is NaN meanwhile."""
    name = request.param
    if name == "cpu":
        found: Backend = Cpu()
    elif name == "simulator":
        found = Simulator(request.getfixturevalue("simt"))
    elif name == "interpreter":
        found = Interpreted(request.getfixturevalue("interpreter"))
    else:
        reason = fr.backends()["cuda"].reason
        if reason and os.environ.get("FUSED_RESNET_REQUIRE_GPU") == "1":
            pytest.fail(f"no GPU to test on: {reason}")
        if reason:
            pytest.skip(f"no GPU to test on: {reason}")
        found = Gpu(request.getfixturevalue("device"))
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # at::empty then fills with NaN
    yield found
    torch.use_deterministic_algorithms(before, warn_only=warn_only)
