"""``fused-resnet freeze``: a trained network as one file to serve from."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from ..inference.archive import write_frozen
from ..models import sources
from ..models.optional import MissingPackageError
from ..models.weights import is_path, load_weights
from ._common import DTYPES, UsageError, network, one_of, writable


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Register the subcommand."""
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
        help="for example resnet50, cifar_resnet56, timm:resnet50, hf:microsoft/resnet-50 or "
        "torchvision:resnet50",
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
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Read the weights, build the network, write the file."""
    theirs = arguments.model in sources.MODELS
    try:
        if not theirs and not is_path(arguments.weights):
            raise ValueError(
                "there is no such file; only torchvision's networks have named weights"
            )
        state = load_weights(arguments.weights, name=arguments.model if theirs else None)
        file = write_frozen(
            arguments.out,
            arguments.model,
            state,
            dtype=getattr(torch, arguments.dtype),
            winograd=not arguments.no_winograd,
        )
    except MissingPackageError:
        raise
    except OSError as error:
        raise UsageError(f"freeze: can't write {str(arguments.out)!r}: {error.strerror}") from None
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"freeze: --weights {arguments.weights}: {reason}") from None
    size = arguments.out.stat().st_size / 2**20
    print(
        f"{arguments.out}: {file.network}, {file.classes} classes, {arguments.dtype}, "
        f"{size:.1f} MiB; load it with fused_resnet.load_frozen"
    )
    return 0
