"""The experiment of the ResNet paper: plain networks get worse with depth, residual ones don't.

Source:
    He et al., "Deep Residual Learning for Image Recognition", 2015, section 4.2 and figure 6.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..models.cifar import DEPTHS
from . import checkpoint, curves
from .report import Reporter
from .run import train
from .settings import Settings

#: The networks of the figures' story, in the order in which they are trained.
NETWORKS = (("plain", 20), ("residual", 20), ("plain", 56), ("residual", 56))

#: The paper's schedule, its steps as fractions of the run. The warm-up is what the paper gives to
#: its 110 layers; in a run of a few epochs the rate of 0.1 is too high at first for 56 layers too.
PAPER: dict[str, Any] = {
    "batch": 128,
    "optimizer": "sgd",
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "schedule": "steps",
    "drops": (0.5, 0.75),
    "warmup": 1.0,
}

Network = tuple[str, int]


def parse(text: str) -> Network:
    """A network of the story by its name: ``plain-20``, ``residual-56``.

    Args:
        text: The name.

    Raises:
        ValueError: There is no such network.
    """
    kind, _, depth = text.partition("-")
    if kind not in ("plain", "residual") or depth not in map(str, DEPTHS):
        raise ValueError(
            f"unknown network {text!r}; expected plain- or residual- and one of "
            f"{', '.join(map(str, DEPTHS))}"
        )
    return kind, int(depth)


def run(
    base: Settings,
    networks: Sequence[Network],
    reporter: Reporter | None = None,
    written: Callable[[dict[Network, list[dict[str, Any]]]], None] = lambda _: None,
) -> dict[Network, list[dict[str, Any]]]:
    """Train the networks one after another, each in its folder under ``base.out``.

    A network whose folder has a whole run is not trained again, and one that was interrupted goes
    on from its checkpoint, so the same call finishes what another began.

    Args:
        base: Settings that all of them share; its ``model`` is ignored.
        networks: Kinds and depths.
        reporter: Told what happens; None for silence.
        written: Called after each network with the histories so far.

    Returns:
        The history of each network.

    Raises:
        TrainingError: A run can't start or go on; the message is one line.
    """
    histories: dict[Network, list[dict[str, Any]]] = {}
    for (kind, depth), settings in _settings(base, networks):
        histories[kind, depth] = train(settings, reporter).history
        written(histories)
    return histories


def save(
    out: Path, histories: dict[Network, list[dict[str, Any]]], document: dict[str, Any]
) -> None:
    """Write ``story.json`` and ``story.png``.

    Args:
        out: The folder of the story.
        histories: History of each network, from :func:`run`.
        document: Description of the run, to which the networks are added.
    """
    networks = [
        {"network": f"{kind}-{depth}", "history": history, **final_errors(history)}
        for (kind, depth), history in histories.items()
    ]
    text = json.dumps({**document, "networks": networks}, indent=1) + "\n"
    checkpoint.write_bytes(out / "story.json", text.encode())
    curves.save_story(out / "story.png", histories)


def final_errors(history: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Training and test error in percent: those of the last epoch, and the least test error.

    Args:
        history: History of a run, an entry for each epoch.
    """
    errors = [100 * (1 - entry["val_accuracy"]) for entry in history]
    return {
        "train_error": round(100 * (1 - history[-1]["train_accuracy"]), 2),
        "test_error": round(errors[-1], 2),
        "best_test_error": round(min(errors), 2),
    }


def _settings(base: Settings, networks: Sequence[Network]) -> Iterator[tuple[Network, Settings]]:
    names = {"plain": "cifar_plain", "residual": "cifar_resnet"}
    for kind, depth in networks:
        out = Path(base.out) / f"{kind}-{depth}"
        yield (
            (kind, depth),
            dataclasses.replace(
                base,
                model=f"{names[kind]}{depth}",
                out=str(out),
                resume=(out / "last").is_file(),
            ),
        )
