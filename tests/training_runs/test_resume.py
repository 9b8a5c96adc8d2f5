"""A run that SIGKILL ends goes on from its checkpoint, to the same bits.

Each run is a process of its own that kills itself, for real, at a chosen moment.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import tiny_data
import warm_process

from fused_resnet import training
from fused_resnet.models.weights import load_weights
from fused_resnet.training import checkpoint

pytest.importorskip("torchvision", reason="torchvision's transforms are what is run")
pytest.importorskip("yaml", reason="a run writes RUN/recipe.yaml")

#: All that a step depends on: averages, momentum, mixup's random numbers, a warm-up, a checkpoint
#: within the epoch.
SETTINGS = {"ema": 0.9, "mixup": 0.4, "warmup": 0.5, "save_every": 3, "label_smoothing": 0.1}

#: Runs `fused-resnet train` and kills itself at the nth step, or at the nth byte of all that it
#: writes into new files of the checkpoint.
PROGRAM = """
import os, signal, sys
from fused_resnet import cli
from fused_resnet.tuning import atomic_file
from fused_resnet.training import checkpoint, run

moment, number = sys.argv[1], int(sys.argv[2])
count = 0

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def counting(function):
    def call(*arguments):
        global count
        count += 1
        if count == number:
            die()
        return function(*arguments)
    return call

if moment == "step":
    run.train_step = counting(run.train_step)
elif moment == "rename":  # the new checkpoint is whole, and not yet in its place
    atomic_file.os.replace = counting(os.replace)
elif moment == "write":
    write = checkpoint.write_bytes
    def half(path, data):
        global count
        count += path.name == "last"
        if path.name == "last" and count == number:
            with atomic_file.replacing(path) as part, open(part, "wb") as file:
                file.write(data[: len(data) // 2])
                file.flush()
                die()
        write(path, data)
    checkpoint.write_bytes = half
sys.exit(cli.main(sys.argv[3:]))
"""


def command(archive: str, out: Path) -> list[str]:
    settings = tiny_data.settings(archive, out, **SETTINGS)
    options = f"--data {archive} --out {out} --epochs 2 --batch 8 --lr {settings.lr} --device cpu"
    for name, value in SETTINGS.items():
        options += f" --{name.replace('_', '-')} {value}"
    return ["train", settings.model, *options.split()]


def run(moment: str, number: int, arguments: list[str]) -> int:
    done = warm_process.run(["-c", PROGRAM, moment, str(number), *arguments])
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The data, and an uninterrupted run on it."""
    place = tmp_path_factory.mktemp("straight")
    archive = tiny_data.archive(place / "tiny.npz")
    assert run("never", 0, command(archive, place / "run")) == 0
    return archive, place / "run"


@pytest.mark.parametrize(
    ("moment", "number", "steps"),
    [
        pytest.param("step", 3, None, id="before the first checkpoint"),
        pytest.param("step", 5, 3, id="within an epoch"),
        pytest.param("step", 8, 6, id="within the second epoch"),
        pytest.param("write", 2, 3, id="in the middle of writing a checkpoint"),
        pytest.param("rename", 5, 3, id="before a checkpoint takes its place"),
    ],
)
def test_the_same_bits(
    moment: str, number: int, steps: int | None, straight: tuple[str, Path], tmp_path: Path
) -> None:
    archive, expected = straight
    out = tmp_path / "run"
    assert run(moment, number, command(archive, out)) == -signal.SIGKILL
    if steps is None:
        assert not (out / "last").exists()
        arguments = command(archive, out)
    else:
        found = checkpoint.read(out / "last")
        assert found["epoch"] * 5 + found["step"] == steps
        arguments = ["train", "--out", str(out), "--resume", "--workers", "1"]
    assert run("never", 0, arguments) == 0
    tiny_data.same_bits(checkpoint.read(out / "last"), checkpoint.read(expected / "last"))
    weights = "best.safetensors"
    assert (out / weights).read_bytes() == (expected / weights).read_bytes()
    assert load_weights(out / weights)  # which the order of its metadata left whole
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_run_that_is_over_stays_as_it_is(straight: tuple[str, Path]) -> None:
    _, out = straight
    before = (out / "last").read_bytes()
    result = training.train(training.resumed(out))
    assert [entry["epoch"] for entry in result.history] == [1, 2]
    assert (out / "last").read_bytes() == before
