"""The benchmark harness, its rows and files, and the results of every provider."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import warm_process

from fused_resnet.bench import (
    environment,
    harness,
    inference,
    memory,
    networks,
    operations,
    plot,
    results,
)
from fused_resnet.bench import problem as problems
from fused_resnet.bench.harness import Entry, Measurement, Worker, WorkerError, compare
from fused_resnet.bench.peers import RUNTIMES
from fused_resnet.bench.providers import NAMES
from fused_resnet.bench.subject import Subject, UnavailableError
from fused_resnet.models import sources
from fused_resnet.models.optional import install_line

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _subjects_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))


@pytest.fixture
def _warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers begin with PyTorch imported; in the first test they start from nothing."""
    warm_process.instead_of_popen(monkeypatch, harness)


def entry(name: str, function: str, limit: float = 1e-3, **case: Any) -> Entry:
    return Entry(name, f"bench_subjects:{function}", case, limit)


def fast(entries: list[Entry], rounds: int = 2, **how: Any) -> list[Measurement]:
    return compare(
        entries, threads=1, rounds=rounds, round_seconds=0.004, warm_up_seconds=0.01, **how
    )


# The mechanism


def test_one_provider_computes_at_a_time_and_the_order_rotates() -> None:
    measured = fast([entry(name, "good") for name in "abc"], rounds=4)
    assert [m.status for m in measured] == ["ok"] * 3
    turns = sorted((start, end, m.name) for m in measured for start, end in m.rounds)
    assert "".join(name for _, _, name in turns) == "abcbcacababc"
    for (_, end, _), (start, _, _) in itertools.pairwise(turns):
        assert end <= start
    for m in measured:
        assert m.threads == 1
        assert len(m.rounds) == 4
        # A call sleeps for a millisecond; a round of 4 ms has at most 4 of them, and at least one.
        assert 4 <= len(m.times) <= 16
        assert min(m.times) >= 1e-3


@pytest.mark.usefixtures("_warm")
def test_one_failure_does_not_affect_the_others() -> None:
    measured = fast(
        [
            entry("wrong", "good", error=2e-3),
            entry("not a number", "good", error=math.nan),
            entry("raises", "raises"),
            entry("unavailable", "unavailable"),
            entry("no such", "no_such_function"),
            entry("dies at once", "dies_after", calls=0),
            # One call builds; at 0.01 s of warm-up some ten more follow; the rest are rounds.
            entry("dies later", "dies_after", calls=40),
            entry("good", "good", error=9e-4),
        ],
        rounds=20,
    )
    by_name = {m.name: m for m in measured}
    assert {name: m.status for name, m in by_name.items()} == {
        "wrong": "wrong",
        "not a number": "wrong",
        "raises": "failed",
        "unavailable": "unavailable",
        "no such": "failed",
        "dies at once": "failed",
        "dies later": "failed",
        "good": "ok",
    }
    assert by_name["wrong"].reason == "relative error 2.0e-03, limit 1.0e-03"
    assert by_name["raises"].reason == "ValueError: first line"
    assert by_name["unavailable"].reason == "pip install something"
    assert "no_such_function" in by_name["no such"].reason
    for name in ("dies at once", "dies later"):
        assert "SIGABRT" in by_name[name].reason
        assert "last words" in by_name[name].reason
    for name in ("wrong", "not a number", "raises", "dies at once"):
        assert by_name[name].times == []
    assert len(by_name["good"].rounds) == 20


@pytest.mark.usefixtures("_warm")
def test_what_a_provider_prints_is_no_answer() -> None:
    assert [m.status for m in fast([entry("noisy", "noisy")])] == ["ok"]


@pytest.mark.usefixtures("_warm")
def test_a_provider_that_hangs_is_ended() -> None:
    with Worker(threads=1) as worker:
        worker.request("build", target="bench_subjects:hangs_after", case={"calls": 1})
        worker.timeout = 0.2
        with pytest.raises(WorkerError, match=r"no answer within 0\.2 s"):
            worker.request("round", iterations=1)


@pytest.mark.usefixtures("_warm")
def test_an_interruption_ends_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Worker] = []

    class Recorded(Worker):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(harness, "Worker", Recorded)

    def interrupt(name: str, action: str) -> None:
        if action.startswith("round"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fast([entry("a", "good"), entry("b", "good")], progress=interrupt)
    assert len(made) == 2
    for worker in made:
        assert worker._process.poll() is not None


@pytest.mark.usefixtures("_warm")
def test_steps_counts_the_calls_of_progress() -> None:
    entries = [entry("a", "good"), entry("b", "good")]
    calls: list[tuple[str, str]] = []
    fast(entries, rounds=3, progress=lambda name, action: calls.append((name, action)))
    assert len(calls) == harness.steps(entries, 3)
    assert calls[0] == ("a", "build")
    assert calls[-1][1] == "round 3 of 3"


# Rows


def rows_of(measurements: list[Measurement], **how: Any) -> list[results.Row]:
    facts = {"subject": "resnet50", "batch": 4, "dtype": "float32", "size": 224, "threads": 2}
    return results.rows(measurements, **{**facts, "environment": {"commit": "abc"}, **how})


def timed(name: str, *milliseconds: float) -> Measurement:
    times = [t / 1e3 for t in milliseconds]
    return Measurement(name, error=1e-7, threads=2, times=times, rounds=[(0.0, 1.0)])


def test_rows_hold_medians_quantiles_and_ratios() -> None:
    base, ours = rows_of([timed("channels_last", 30, 10, 20), timed("frozen", 8, 10, 6, 4, 2)])
    assert base["median_ms"] == pytest.approx(20)
    assert base["ratio"] == pytest.approx(1)
    # Of 2, 4, 6, 8, 10 the places 0.2 * 4 and 0.8 * 4 lie four fifths and one fifth of a step on.
    assert ours["median_ms"] == pytest.approx(6)
    assert ours["p20_ms"] == pytest.approx(3.6)
    assert ours["p80_ms"] == pytest.approx(8.4)
    assert ours["images_per_s"] == pytest.approx(4 / 6e-3)
    assert ours["ratio"] == pytest.approx(20 / 6)
    assert ours["samples"] == 5
    assert ours["commit"] == "abc"


def test_rows_hold_the_ratio_to_the_best_peer() -> None:
    names = {"eager": 20, "openvino": 10, "frozen": 5, "fused": 8}
    rows = rows_of([timed(n, ms) for n, ms in names.items()], peers=("eager", "openvino", "ncnn"))
    assert {row["best_peer"] for row in rows} == {"openvino"}
    ratios = {row["provider"]: row["ratio_to_best_peer"] for row in rows}
    assert ratios == pytest.approx({"eager": 0.5, "openvino": 1, "frozen": 2, "fused": 1.25})
    assert rows_of([timed("frozen", 5)])[0]["ratio_to_best_peer"] is None


def test_rows_hold_memory_and_the_cores_that_computed() -> None:
    measured = timed("frozen", 5)
    measured.rounds = [(0.0, 1.0), (5.0, 6.0)]
    measured.cpu_seconds, measured.peak_bytes, measured.base_bytes = 3.0, 3 * 2**20, 2**20
    (row,) = rows_of([measured])
    assert (row["cores"], row["peak_mib"], row["base_mib"]) == (1.5, 3, 1)


@pytest.mark.skipif(memory.peak_bytes() is None, reason="no /proc/self/status on this system")
def test_the_peak_of_memory_starts_anew() -> None:
    size = 64 * 2**20
    held = bytearray(size)
    del held  # given back, but still in the peak
    memory.reset_peak()
    before = memory.peak_bytes()
    assert before is not None
    held = bytearray(size)
    after = memory.peak_bytes()
    assert after is not None
    assert size * 0.9 < after - before < size * 1.5
    assert len(held) == size


def test_without_a_baseline_there_is_no_ratio() -> None:
    failed = Measurement("channels_last", status="failed", reason="no compiler")
    broken, ours = rows_of([failed, timed("frozen", 1)])
    assert ours["ratio"] is None
    assert "median_ms" not in broken
    assert results.complaints([broken, ours]) == [
        "resnet50, batch 4, channels_last: failed: no compiler"
    ]


def test_a_row_says_where_and_with_what() -> None:
    facts = environment.describe()
    assert set(facts) == {"device", "processors", "isa", "os", "versions", "commit", "load"}
    assert facts["device"]
    assert facts["versions"]["torch"] == torch.__version__


def test_a_file_is_written_atomically(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    results.save(path, [{"a": 1}])
    with pytest.raises(TypeError):
        results.save(path, [{"a": object()}])
    assert results.load(path) == [{"a": 1}]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"]


def test_plot(tmp_path: Path) -> None:
    rows = rows_of(
        [timed("channels_last", 30, 10, 20), timed("frozen", 6)],
        environment={"device": "a processor"},
    )
    picture = tmp_path / "rows.png"
    plot.save(picture, rows)
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to plot"):
        plot.save(picture, rows_of([Measurement("frozen", status="failed")]))


# The answers of the providers


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("problem")
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 32, 32, generator=generator)
    model = networks.random_model("resnet18", torch.randn(8, 3, 32, 32, generator=generator))
    problems.write_problem(folder, model, images)
    return folder


def built(provider: str, dtype: str, problem: Path) -> Subject:
    try:
        return inference.build(provider, "resnet18", dtype, str(problem))
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture
def _inductor_as_it_was() -> Iterator[None]:
    import torch._inductor.config as inductor

    freezing = inductor.freezing
    yield
    inductor.freezing = freezing
    torch.compiler.reset()


@pytest.mark.usefixtures("_inductor_as_it_was")
@pytest.mark.parametrize(
    "provider",
    [pytest.param(p, marks=pytest.mark.slow) if p == "compile" else p for p in NAMES],
)
def test_provider_answers_rightly(provider: str, problem: Path) -> None:
    subject = built(provider, "float32", problem)
    with torch.inference_mode():
        subject.call()
        assert subject.error() < 1e-5


@pytest.mark.parametrize("provider", ["openvino", "ncnn"])
def test_runtimes_answer_within_the_limit_of_bfloat16(provider: str, problem: Path) -> None:
    subject = built(provider, "bfloat16", problem)
    with torch.inference_mode():
        # Beyond float32's: it was bfloat16 that computed.
        assert 1e-4 < subject.error() < networks.LIMITS["bfloat16"]


def test_a_runtime_without_a_dtype_says_so(problem: Path) -> None:
    for provider in ("onnxruntime", "openvino", "ncnn"):
        with pytest.raises(UnavailableError, match=f"{provider}.*(float64|not installed)"):
            inference.build(provider, "resnet18", "float64", str(problem))


@pytest.mark.parametrize("provider", RUNTIMES)
def test_a_missing_runtime_says_what_to_install(
    provider: str, problem: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match=re.escape(install_line("bench"))):
        inference.build(provider, "resnet18", "float32", str(problem))


def test_runtimes_use_their_number_of_threads(problem: Path) -> None:
    """Each in its process, where no other thread pool computes: one core, and no more."""
    measured = compare(
        inference.entries(tuple(RUNTIMES), "resnet18", "float32", problem),
        threads=1,
        rounds=2,
        round_seconds=0.1,
        warm_up_seconds=0.1,
    )
    for row in rows_of(measured):
        if row["status"] == "unavailable":
            continue
        assert row["status"] == "ok", row["reason"]
        assert row["threads"] == 1
        # A bound from above, which a busy machine cannot pass.
        assert row["cores"] < 1.2


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_frozen_answers_within_the_limit_of_its_dtype(dtype: str, problem: Path) -> None:
    subject = inference.build("frozen", "resnet18", dtype, str(problem))
    with torch.inference_mode():
        assert 0 < subject.error() < networks.LIMITS[dtype]


def test_a_wrong_network_is_beyond_every_limit(problem: Path) -> None:
    """The limits are wide; they must still tell a network without its residuals' batch norms."""
    state = torch.load(problem / "state.pt", weights_only=True)
    images = torch.load(problem / "images.pt", weights_only=True)
    truth = torch.load(problem / "truth.pt", weights_only=True)
    state["layer1.0.bn2.running_mean"].zero_()
    state["layer1.0.bn2.running_var"].fill_(1.0)
    with torch.inference_mode():
        answer = sources.torchvision_model("resnet18", state)(images)
    assert networks.relative_error(answer, truth) > max(networks.LIMITS.values())


@pytest.mark.parametrize("shape", operations.SHAPES)
def test_operations_answer_rightly(shape: str) -> None:
    for provider in operations.providers(shape):
        subject = operations.build(provider, shape, batch=1, dtype="float32")
        with torch.inference_mode():
            assert 0 < subject.error() < 1e-5
