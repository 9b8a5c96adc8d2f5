"""What a person sees: plain lines in a file, a bar on a terminal."""

from __future__ import annotations

import io

import pytest
import tiny_data
import torch
from rich.console import Console

from fused_resnet.training import report, run
from fused_resnet.training.engine import started
from fused_resnet.training.steps import Sums

ENTRY = {
    "epoch": 1, "step": 10, "lr": 0.05, "train_loss": 1.5, "train_accuracy": 0.25,
    "val_loss": 2.0, "val_accuracy": 0.5, "images_per_s": 123.4,
}  # fmt: skip


class Clock:
    """Time that passes only if it is told to."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(report, "time", clock)
    return clock


def epoch_of(reporter: report.Lines, clock: Clock) -> None:
    """Ten steps of 8 images, one every 8 seconds; 5 of the 20 were done before."""
    settings = tiny_data.settings("a.npz", "run")
    with started(settings) as engine:
        sums = Sums(engine)
        sums.add(torch.tensor(3.0), torch.eye(4), torch.tensor([0, 1, 2, 0]))
    reporter.begin(settings, 5, 10)
    for step in range(6, 11):
        clock.now += 8
        reporter.step(0, step, 8.0 * step, 0.05, sums)
    reporter.epoch(ENTRY, True)


def test_lines(clock: Clock) -> None:
    stream = io.StringIO()
    assert type(report.reporter(stream)) is report.Lines
    epoch_of(report.Lines(stream), clock)
    begin, within, end = stream.getvalue().splitlines()
    assert begin == (
        "cifar_resnet20 (fused, float32) on a.npz: after step 5 of 20, "
        "2 epochs of 10 steps of 8 images"
    )
    # The fourth step, 32 seconds after the start, with 11 to go.
    assert within == (
        "epoch 1/2, step 9/10: 1 images/s, loss 3.0000, accuracy 75.00%, lr 0.05, 1:28 left"
    )
    assert end == (
        "epoch 1: training loss 1.5000, accuracy 25.00%; validation loss 2.0000, accuracy 50.00% "
        "(best); 123 images/s, lr 0.05, 1:20 left"
    )


def test_a_bar(clock: Clock) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=160, color_system=None)
    reporter = report.Bar(console)
    epoch_of(reporter, clock)
    assert reporter.bar is None
    text = stream.getvalue()
    assert "epoch 1: training loss 1.5000" in text
    assert "10/10" in text
    assert "1 images/s, loss 3.0000, accuracy 75.00%, lr 0.05" in text
    assert text.endswith("left\n")


def test_a_run_that_stops_leaves_no_bar() -> None:
    closed = []

    class Kept(report.Silent):
        def close(self) -> None:
            closed.append(True)

    with pytest.raises(run.TrainingError):
        run.train(tiny_data.settings("none.npz", "run"), Kept())
    assert closed == [True]
