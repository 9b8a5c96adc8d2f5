"""``fused-resnet train``: train or fine-tune a network, and go on after an interruption."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import torch

from .. import training
from ..models.optional import MissingPackageError
from ..training.report import reporter
from ..tuning import processor
from . import _settings
from ._common import UsageError, network

#: The settings that are options, in the order of ``--help``.
OPTIONS = (
    "data_root", "download", "size", "augment", "workers",
    "weights", "freeze_backbone",
    "epochs", "batch", "lr", "optimizer", "momentum", "nesterov", "weight_decay", "schedule",
    "drops", "warmup", "label_smoothing", "mixup", "ema",
    "dtype", "channels_last", "unfused", "compile", "device", "sync_bn", "deterministic",
    "seed", "save_every", "resume",
)  # fmt: skip


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Register the subcommand.

    Args:
        commands: Subparsers of the command line, to which the subcommand is added.
    """
    parser = commands.add_parser(
        "train",
        help="train or fine-tune a network on your images",
        description="Trains a network with fused blocks and writes RUN/best.safetensors, RUN/last "
        "(the checkpoint), RUN/metrics.jsonl, RUN/curves.png and RUN/recipe.yaml. A run that was "
        "interrupted, at whatever moment, goes on with: fused-resnet train --out RUN --resume. "
        "Several processes: torchrun --nproc-per-node 2 -m fused_resnet train ...; --batch then "
        "counts the images of all together.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        type=network,
        metavar="MODEL",
        help="for example resnet50, cifar_resnet56, cifar_plain56, timm:resnet50, "
        "hf:microsoft/resnet-50 or torchvision:resnet50",
    )
    parser.add_argument(
        "--data",
        default=argparse.SUPPRESS,
        metavar="D",
        help="a folder with train/CLASS/* and val/CLASS/*, an .npz file with uint8 train_images, "
        "train_labels, val_images and val_labels, or cifar10, cifar100 or fashion_mnist",
    )
    parser.add_argument(
        "--out", required=True, metavar="RUN", help="folder of the run, which is made"
    )
    parser.add_argument(
        "--recipe",
        metavar="FILE|NAME",
        help="settings from a .yaml or .toml file, or shipped ones: "
        f"{', '.join(training.SHIPPED)}; options that are given count more",
    )
    _settings.add(parser, OPTIONS)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train, and say what to do next.

    Args:
        arguments: Parsed command-line arguments of the subcommand.

    Returns:
        The exit status of the process.
    """
    torch.set_num_threads(processor.threads())
    try:
        settings = _read(arguments)
        result = training.train(settings, reporter(sys.stderr))
    except MissingPackageError:
        raise
    except training.DivergedError as error:
        print(f"fused-resnet: train: {error}", file=sys.stderr)
        return 1
    except (training.TrainingError, ValueError) as error:
        raise UsageError(f"train: {str(error).splitlines()[0]}") from None
    if int(os.environ.get("RANK", 0)) == 0:
        served = Path(settings.out) / "served.safetensors"
        print(
            f"best validation accuracy {result.best_accuracy:.2%}; next: fused-resnet freeze "
            f"{settings.model} --weights {result.weights} --out {served}"
        )
    return 0


def _read(arguments: argparse.Namespace) -> training.Settings:
    """Settings from the recipe and the options, or for ``--resume`` alone from the run itself."""
    typed = _settings.explicit_settings(arguments)
    recipe = training.read_recipe(arguments.recipe) if arguments.recipe else {}
    if typed.get("resume") and "model" not in {**recipe, **typed}:
        return dataclasses.replace(training.resumed(arguments.out), **typed)
    values = {**recipe, **typed}
    for name in ("model", "data"):
        if name not in values:
            word = "MODEL" if name == "model" else "--data"
            out = values.get("out")
            begun = out is not None and (Path(out) / "last").exists()
            hint = "; --resume goes on with the run in --out" if begun else ""
            raise ValueError(f"expected {word}, which neither the options nor a recipe has{hint}")
    return training.from_mapping(values)
