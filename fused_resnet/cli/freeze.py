"""``fused-resnet freeze``: a trained network as one file to serve from."""

from __future__ import annotations

import argparse
import importlib.util
import json
from typing import Any

import torch

from ..inference import preprocessing
from ..inference.archive import write_frozen
from ..models import sources
from ..models.optional import MissingPackageError, library
from ..models.weights import is_path, load_weights, metadata_of
from . import _pictures
from ._common import DTYPES, UsageError, network, one_of, printed_notes, writable


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Register the subcommand.

    Args:
        commands: Subparsers of the command line, to which the subcommand is added.
    """
    parser = commands.add_parser(
        "freeze",
        description="Writes the network's name, its weights and the options of freeze to one file, "
        "atomically and without code. fused_resnet.load_frozen(FILE) and fused-resnet serve-check "
        "FILE fold the batch norms and pack the weights for the machine that they run on, so one "
        "file suits all machines.",
    )
    parser.add_argument(
        "model",
        type=network,
        help="for example resnet50, cifar_resnet56, timm:resnet50 or hf:microsoft/resnet-50; "
        "fused-resnet models lists them",
    )
    parser.add_argument(
        "--weights",
        required=True,
        metavar="PATH|NAME",
        help=".pth or .safetensors file, or for torchvision's networks its name for weights "
        "(IMAGENET1K_V2), which are downloaded once",
    )
    parser.add_argument("--out", required=True, type=writable, metavar="FILE", help="file to write")
    parser.add_argument(
        "--dtype",
        type=one_of("dtype", DTYPES),
        default="float32",
        help="dtype of the frozen network (default: float32); the file keeps that of the weights",
    )
    parser.add_argument(
        "--no-winograd",
        action="store_true",
        help="run all convolutions direct, which rounds less and takes longer",
    )
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help="a file with one class per line, to be stored (default: those of the run of "
        "fused-resnet train that wrote the weights; ImageNet's from torchvision where the network "
        "is its and has 1000 classes)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Read the weights, build the network, write the file.

    Args:
        arguments: Parsed command-line arguments of the subcommand.

    Returns:
        The exit status of the process.
    """
    theirs = arguments.model in sources.MODELS
    try:
        if not theirs and not is_path(arguments.weights):
            raise ValueError(
                "there is no such file; only torchvision's networks have named weights"
            )
        with printed_notes():
            state = load_weights(arguments.weights, name=arguments.model if theirs else None)
        labels, transform = _metadata(arguments, sources.classes_of(arguments.model, state))
        file = write_frozen(
            arguments.out,
            arguments.model,
            state,
            dtype=getattr(torch, arguments.dtype),
            winograd=not arguments.no_winograd,
            labels=labels,
            transform=transform,
        )
    except MissingPackageError:
        raise
    except OSError as error:
        raise UsageError(f"freeze: can't write {str(arguments.out)!r}: {error.strerror}") from None
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"freeze: --weights {arguments.weights}: {reason}") from None
    stored = [f"{len(file.labels)} labels"] if file.labels else ["no labels"]
    p = file.preprocessing
    stored += (
        [f"resize {p.resize}, crop {p.crop}, {p.interpolation}"] if p else ["no preprocessing"]
    )
    size = arguments.out.stat().st_size / 2**20
    print(
        f"{arguments.out}: {file.network}, {file.classes} classes, {arguments.dtype}, "
        f"{size:.1f} MiB; {'; '.join(stored)}; load it with fused_resnet.load_frozen"
    )
    return 0


def _metadata(arguments: argparse.Namespace, classes: int) -> tuple[list[str] | None, Any]:
    """Labels and transform: of a training run, torchvision by its weights, or timm by its cfg."""
    labels, transform = _of_run(arguments.weights, classes)
    if arguments.labels:
        labels = _pictures.read_labels("freeze", arguments.labels, classes)
    source, _, name = arguments.model.rpartition(":")
    if transform is not None:
        return labels, transform
    if source == "timm":
        timm = library("timm")
        config = timm.get_pretrained_cfg(name).to_dict()
        transform = timm.data.resolve_data_config({}, pretrained_cfg=config)
    elif arguments.model in sources.MODELS and importlib.util.find_spec("torchvision"):
        enum = _pictures.weights_enum(arguments.model, arguments.weights)
        transform = enum.transforms()
        if labels is None and classes == len(enum.meta["categories"]):
            labels = list(enum.meta["categories"])
    return labels, transform


def _of_run(weights: str, classes: int) -> tuple[list[str] | None, Any]:
    """What ``fused-resnet train`` wrote beside its weights; None and None for other weights.

    Raises:
        ValueError: It does not belong to the weights, or can't be read.
    """
    said = metadata_of(weights)
    if "preprocessing" not in said:
        return None, None
    try:
        labels, fields = json.loads(said["classes"]), json.loads(said["preprocessing"])
    except (KeyError, json.JSONDecodeError) as error:
        raise ValueError("its metadata is not that of fused-resnet train") from error
    if not isinstance(labels, list) or len(labels) != classes:
        raise ValueError(f"its metadata does not name {classes} classes")
    return [str(label) for label in labels], preprocessing.read(fields)
