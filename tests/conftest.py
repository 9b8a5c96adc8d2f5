"""What all tests share: fixtures, the tiers, and the report of the slowest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import warm_process
from fixtures import device, interpreter, simt, simulator_library  # noqa: F401

# Which backend is faster here is not what the tests ask; those of the tuner say what they want.
os.environ.setdefault("FUSED_RESNET_TUNE", "0")

# The tiers: `make check` runs what has neither mark, `make test` all but `slow`, `make test-all`
# everything.

#: Folders whose tests emulate a GPU, or need one.
THOROUGH_FOLDERS = ("simt", "triton_kernels", "gpu")
#: Files that compile, train or measure, run pytest again, or run whole networks in an emulation.
THOROUGH_FILES = (
    "test_bench.py",
    "test_block_distributed.py",
    "test_bench_training.py",
    "test_block_compile.py",
    "test_build.py",
    "test_cli.py",
    "test_cli_tune.py",
    "test_compile.py",
    "test_examples_serving.py",
    "test_exported.py",
    "test_fuse_networks.py",
    "test_gpu_bench.py",
    "test_gpu_children.py",
    "test_gpu_rehearsal.py",
    "test_hostile_calls.py",
    "test_instruction_sets.py",
    "test_matrix.py",
    "test_readme.py",
    "test_resume.py",
    "test_serving.py",
    "test_static_gate.py",
    "test_traced_distributed.py",
    "test_traced_property.py",
    "test_training.py",
    "test_tuner_cache.py",
    "test_tuner_packed.py",
    "test_verify.py",
)
#: Folders and files whose tests share no fixture that is costly to make: under pytest-xdist each of
#: these tests goes to the next free worker, while all other files stay whole. xdist hands out what
#: has the most tests first, so the single ones fill the gaps at the end.
SPREAD = ("conformance", "simt", "test_instruction_sets.py", "triton_kernels")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        action="append",
        default=[],
        choices=["cpu", "simulator", "interpreter", "device"],
        help="run the conformance suite on this backend only (may be given more than once)",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    backends = config.getoption("--backend")
    if backends:
        other = [item for item in items if _parameter(item, "backend") not in (None, *backends)]
        config.hook.pytest_deselected(items=other)
        gone = set(other)
        items[:] = [item for item in items if item not in gone]
    for item in items:
        _, *place = item.nodeid.partition("::")[0].split("/")
        if place[0] in THOROUGH_FOLDERS or place[-1] in THOROUGH_FILES:
            item.add_marker(pytest.mark.thorough)
        if place[0] not in SPREAD:
            item.add_marker(pytest.mark.xdist_group("/".join(place)))


def _parameter(item: pytest.Item, name: str) -> str | None:
    """Of a test of the conformance suite, else None."""
    if item.path.parent.name != "conformance":
        return None
    return getattr(item, "callspec").params.get(name)  # noqa: B009


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same numbers in every run, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real data that FUSED_RESNET_TEST_DATA names; skips where there is none."""
    folder = os.environ.get("FUSED_RESNET_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("FUSED_RESNET_TEST_DATA names no folder with the CIFAR-10 slice and weights")
    return Path(folder)


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    """Commands that are run in this process set PyTorch's threads, and sums depend on them."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


# The slowest tests, by the processor time of the test and its child processes: wall time says more
# about what else the machine does. `make check` and `make test` are cut by this list.

SLOWEST = 25


def _cpu_seconds() -> float:
    used = os.times()
    own = used.user + used.system + used.children_user + used.children_system
    return own + warm_process.cpu_seconds()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item):
    item.cpu_begun = _cpu_seconds()
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item):
    result = yield
    item.user_properties.append(("cpu_seconds", _cpu_seconds() - item.cpu_begun))
    return result


def pytest_terminal_summary(terminalreporter) -> None:
    seconds = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            used = dict(getattr(report, "user_properties", ())).get("cpu_seconds")
            if used is not None and report.when == "teardown":
                seconds[report.nodeid] = used
    if len(seconds) <= SLOWEST:
        return
    total = sum(seconds.values())
    terminalreporter.section(f"slowest {SLOWEST} of {len(seconds)} tests, {total:.0f} CPU seconds")
    for name in sorted(seconds, key=seconds.__getitem__, reverse=True)[:SLOWEST]:
        terminalreporter.write_line(f"{seconds[name]:7.1f} s  {name}")
