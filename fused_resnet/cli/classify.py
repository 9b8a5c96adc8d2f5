"""``fused-resnet classify``: the classes of photographs, by PyTorch and by this package."""

from __future__ import annotations

import argparse
from typing import Any

import torch

import fused_resnet as fr

from ..bench.networks import relative_error
from ..models.sources import MODELS
from . import _pictures
from ._common import console, one_of


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Register the subcommand."""
    parser = commands.add_parser(
        "classify",
        description="Classifies each photograph twice, with torchvision's network and with the "
        "same network fused and frozen, and prints both results.",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="a photograph")
    parser.add_argument(
        "--model", type=one_of("model", MODELS), default="resnet50", help="default: resnet50"
    )
    parser.add_argument(
        "--weights",
        required=True,
        metavar="PATH|NAME",
        help=".pth or .safetensors file, or torchvision's name for weights (IMAGENET1K_V2), which "
        "are downloaded once",
    )
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help="a file with one class per line (default: ImageNet's, from torchvision)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Classify and print."""
    pictures = [_pictures.read_image("classify", path) for path in arguments.images]
    enum = _pictures.weights_enum(arguments.model, arguments.weights)
    theirs = _pictures.trained_model("classify", arguments.model, arguments.weights)
    classes = theirs.get_parameter("fc.bias").numel()
    labels = _pictures.read_labels("classify", arguments.labels, classes, enum)
    ours = fr.freeze(theirs)
    prepare = enum.transforms()
    out = console()
    for path, picture in zip(arguments.images, pictures, strict=True):
        x = prepare(picture)[None]
        with torch.inference_mode():
            answers = {"PyTorch": theirs(x)[0], "fused_resnet": ours(x)[0]}
        out.print(_pictures.top_table(path, answers, labels))
        difference = relative_error(answers["fused_resnet"], answers["PyTorch"])
        out.print(f"relative difference of the logits: {difference:.1e}", highlight=False)
    return 0
