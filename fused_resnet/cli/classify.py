"""``fused-resnet classify``: the classes of photographs, by PyTorch and by this package."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import fused_resnet as fr

from ..bench.networks import relative_error
from ..models import sources
from ..models.sources import MODELS
from . import _pictures
from ._common import UsageError, console, network_or_file


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Register the subcommand.

    Args:
        commands: Subparsers of the command line, to which the subcommand is added.
    """
    parser = commands.add_parser(
        "classify",
        description="Classifies each photograph twice, with torchvision's network and with the "
        "same network fused and frozen, and prints both results.",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="a photograph")
    parser.add_argument(
        "--model",
        type=network_or_file,
        default="resnet50",
        metavar="NETWORK|FILE",
        help="a network (fused-resnet models), or a frozen file, which has the weights (default: "
        "resnet50)",
    )
    parser.add_argument(
        "--weights",
        metavar="PATH|NAME",
        help="for a network's name: .pth or .safetensors file, or torchvision's name for weights "
        "(IMAGENET1K_V2), which are downloaded once",
    )
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help="a file with one class per line (default: the frozen file's, or ImageNet's)",
    )
    parser.set_defaults(run=run)


def _refuse_a_network(path: str) -> None:
    """Say where a network belongs that stands among the photographs, as other commands take it."""
    if Path(path).suffix in (".safetensors", ".pt", ".pth"):
        what, options = "a file of weights", f"--model {path} (frozen file) or --weights {path}"
    elif not Path(path).exists() and _is_network(path):
        what, options = "a network", f"--model {path}"
    else:
        return
    raise UsageError(f"classify: {path!r} is {what}, not a photograph; write: IMAGE {options}")


def _is_network(text: str) -> bool:
    try:
        sources.parse(text)
    except sources.UnknownNetworkError:
        return False
    return True


def run(arguments: argparse.Namespace) -> int:
    """Classify and print.

    Args:
        arguments: Parsed command-line arguments of the subcommand.

    Returns:
        The exit status of the process.
    """
    file, name = arguments.model, arguments.model.network
    for path in arguments.images:
        _refuse_a_network(path)
    if file.state and arguments.weights:
        raise UsageError("classify: expected no --weights: the frozen file of --model has its own")
    if not file.state and not arguments.weights:
        raise UsageError("classify: expected --weights FILE, or a frozen file by --model FILE")
    pictures = [_pictures.read_image("classify", path) for path in arguments.images]
    # Without a transform of its own: ImageNet's usual one.
    enum = _pictures.weights_enum(name if name in MODELS else "resnet50", arguments.weights)
    if file.state:
        theirs = _pictures.network_with("classify", name, file.state, "the frozen file")
    else:
        theirs = _pictures.trained_model("classify", name, arguments.weights)
    classes = sources.classes_of(name, theirs.state_dict())
    labels = list(file.labels or ())
    if arguments.labels or not labels:
        labels = _pictures.read_labels("classify", arguments.labels, classes, enum)
    ours = fr.freeze(theirs, dtype=file.dtype, winograd=file.winograd)
    prepare = file.preprocessing or enum.transforms()
    out = console()
    for path, picture in zip(arguments.images, pictures, strict=True):
        x = prepare(picture)[None]
        with torch.inference_mode():
            answers = {"PyTorch": theirs(x)[0], "fused_resnet": ours(x)[0]}
        out.print(_pictures.top_table(path, answers, labels))
        difference = relative_error(answers["fused_resnet"], answers["PyTorch"])
        out.print(f"relative difference of the logits: {difference:.1e}", highlight=False)
    return 0
