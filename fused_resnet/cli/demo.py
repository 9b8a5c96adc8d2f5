"""``fused-resnet demo``: torchvision's ResNet-50 on a photograph, before and after."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

import fused_resnet as fr

from ..bench.networks import in_float64, random_model, relative_error
from ..bench.providers import PROVIDERS
from ..bench.results import table
from ..models.optional import MissingPackageError
from ..tuning import processor
from . import _pictures, _trained
from ._common import console, listed, one_of, positive, threads_of
from .bench import complain, measure

MODEL = "resnet50"

#: Number of crops that calibrate the batch norms: 8 give the last stage 392 values per channel.
CALIBRATION = 8


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Register the subcommand.

    Args:
        commands: Subparsers of the command line, to which the subcommand is added.
    """
    parser = commands.add_parser(
        "demo",
        description="Prints the five most probable classes, the error of the logits and the images "
        "per second of torchvision's ResNet-50 before and after fuse and freeze. Exit code 1 if "
        "the classes differ, or the logits differ by more than rounding.",
    )
    parser.add_argument(
        "image",
        nargs="?",
        metavar="IMAGE",
        help="a photograph (default: one of matplotlib's samples)",
    )
    parser.add_argument(
        "--weights",
        metavar="PATH|NAME",
        help="trained weights (default: torchvision's, from torch.hub's cache or downloaded; if "
        "neither is possible, seeded random ones, calibrated on the photograph)",
    )
    parser.add_argument(
        "--providers",
        type=listed(one_of("provider", PROVIDERS)),
        default=["eager", "channels_last", "jit", "fused", "frozen"],
        metavar="P,...",
        help="providers to time; compile takes a minute more (default: %(default)s)",
    )
    parser.add_argument(
        "--batch", type=positive, default=4, help="batch size of the timing (default: 4)"
    )
    parser.add_argument(
        "--rounds", type=positive, default=6, help="rounds of the timing (default: 6)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Classify, time and print.

    Args:
        arguments: Parsed command-line arguments of the subcommand.

    Returns:
        The exit status of the process.
    """
    out = console()
    path = arguments.image or _photograph()
    picture = _pictures.read_image("demo", path)
    weights, sentence = arguments.weights, ""
    if weights is None:
        entry, sentence = _trained.find(type(_pictures.weights_enum(MODEL)))
        weights = None if entry is None else entry.name
    enum = _pictures.weights_enum(MODEL, weights)
    photo = enum.transforms()(picture)[None]
    crops = _crops(picture, max(arguments.batch, CALIBRATION), enum)
    build = fr.build_info()
    out.print(
        f"torchvision's ResNet-50 on {path}\n{processor.name()}, {threads_of(build['threads'])}, "
        f"{build['isa']}, torch {torch.__version__}",
        highlight=False,
    )
    if sentence:
        out.print(sentence, highlight=False)
    if weights is None:
        out.print(
            "These are seeded random ones, with batch norms calibrated on crops of the "
            "photograph: the classes are meaningless, and what counts is that all three agree. "
            "--weights takes trained ones (make demo WEIGHTS=...).",
            style="yellow",
            highlight=False,
        )
        model = random_model(MODEL, crops)
    else:
        model = _pictures.trained_model("demo", MODEL, weights)

    answers, agreed = _answers(model, photo)
    labels = _pictures.read_labels("demo", None, answers["torchvision"].numel(), enum)
    out.print(_pictures.top_table("the five most probable classes", answers, labels))
    out.print(_errors(answers, in_float64(model, photo)[0]))
    rows = measure(
        model,
        crops[: arguments.batch],
        name=MODEL,
        providers=arguments.providers,
        dtype="float32",
        threads=build["threads"],
        rounds=arguments.rounds,
        command="fused-resnet demo",
    )
    out.print(table(rows, f"speed on {arguments.batch} crops of the photograph"))
    out.print(
        "same five classes in the same order"
        if agreed
        else "the five classes differ between the three",
        style="bold green" if agreed else "bold red",
    )
    return max(complain(rows), int(not agreed))


def _answers(model: nn.Module, photo: Tensor) -> tuple[dict[str, Tensor], bool]:
    with torch.inference_mode():
        answers = {
            "torchvision": model(photo)[0],
            "after fuse": fr.fuse(model)(photo)[0],
            "after freeze": fr.freeze(model)(photo)[0],
        }
    return answers, _pictures.same_top(answers)


def _errors(answers: dict[str, Tensor], truth: Tensor) -> Table:
    result = Table(title="relative error of the logits")
    result.add_column("")
    result.add_column("against float64", justify="right")
    result.add_column("against torchvision", justify="right")
    for name, logits in answers.items():
        against = relative_error(logits, answers["torchvision"])
        result.add_row(name, f"{relative_error(logits, truth):.1e}", f"{against:.1e}")
    return result


def _photograph() -> str:
    try:
        from matplotlib.cbook import get_sample_data
    except ImportError:
        raise MissingPackageError("matplotlib") from None
    return str(get_sample_data("grace_hopper.jpg", asfileobj=False))


def _crops(picture: Any, count: int, enum: Any) -> Tensor:
    """Squares of the photograph at seeded places, from its full height down to a third of it."""
    generator = torch.Generator().manual_seed(0)
    prepare = enum.transforms()
    crops = []
    for _ in range(count):
        scale, left, top = torch.rand(3, generator=generator).tolist()
        side = int(min(picture.size) * (1 / 3 + 2 / 3 * scale))
        x, y = int(left * (picture.width - side)), int(top * (picture.height - side))
        crops.append(prepare(picture.crop((x, y, x + side, y + side))))
    return torch.stack(crops)
