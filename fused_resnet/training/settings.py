"""All settings of a training run, with their defaults and checks.

One table for everybody: the command's options, the keys of a recipe and the arguments of
:class:`Settings` are made from it.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

DTYPES = ("float32", "bfloat16", "float16", "float64")
OPTIMIZERS = ("sgd", "adamw", "rmsprop")
SCHEDULES = ("steps", "cosine", "constant")
DEVICES = ("auto", "cpu", "cuda")


def _option(default: Any, help: str, **more: Any) -> Any:
    """A setting: its default, its line of help, and how the command spells and checks it."""
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to train, on which data, and how.

    Attributes:
        model: The network, as the command's ``--help`` lists them: ``resnet18``,
            ``timm:resnet50``, ``cifar_plain56``.
        data: A folder in ImageFolder's layout (``train/CLASS/*``, ``val/CLASS/*``), ``cifar10``,
            ``cifar100``, ``fashion_mnist``, or an ``.npz`` file with uint8 images and labels.
        out: The folder of the run; it is made.
        data_root: Folder of torchvision's data sets.
        download: Whether to download torchvision's data set if it is not there.
        weights: Weights to start from: a ``.pth`` or ``.safetensors`` file, or torchvision's name
            for them; with another number of classes the head is made anew. None for none.
        freeze_backbone: Whether to train the head alone; the rest keeps its weights and running
            statistics.
        epochs: Passes over the training images.
        batch: Images of a step, of all processes together.
        lr: Learning rate after the warm-up.
        optimizer: ``sgd``, ``adamw`` or ``rmsprop``.
        momentum: Momentum of sgd and rmsprop.
        nesterov: Whether sgd has Nesterov's momentum.
        weight_decay: Weight decay of the optimizer.
        schedule: Learning rate over the run: ``steps``, ``cosine`` or ``constant``.
        drops: Where the schedule ``steps`` has its steps, as ascending fractions of the run; each
            divides the rate by 10.
        warmup: Epochs of linear warm-up.
        label_smoothing: Label smoothing of the loss.
        mixup: Alpha of mixup; 0 is none.
        augment: Whether training images are cropped and flipped at random.
        ema: Decay of an exponential moving average of the weights, which is then what is validated
            and kept as the best; 0 is none.
        size: Height and width of the images; None for 224 in a folder, else the images' own.
        dtype: ``float32``, ``float64``, or ``bfloat16`` or ``float16`` by autocast.
        channels_last: Whether the memory format of images and weights is channels_last.
        unfused: Whether PyTorch's own modules run, to compare with.
        compile: Whether the network runs through ``torch.compile``.
        sync_bn: Whether batch norm is over the images of all processes.
        deterministic: Whether every run gives the same bits; on a GPU it is faster without.
        device: ``cpu``, ``cuda``, or ``auto`` for a GPU where PyTorch finds one.
        workers: Processes that read images, for each process of the run; 0 for that process.
        seed: Seed of weights, order and augmentation.
        save_every: Steps between checkpoints within an epoch; 0 is at its end only.
        resume: Whether to go on from the last checkpoint in ``out``.

    Raises:
        ValueError: A setting is out of its range; the message names it.
    """

    model: str = _option("", "the network")
    data: str = _option("", "the data set")
    out: str = _option("", "the folder of the run")
    data_root: str = _option(
        "data", "folder of torchvision's data sets (default: ./data)", metavar="DIR"
    )
    download: bool = _option(False, "download torchvision's data set if it is not there")
    weights: str | None = _option(
        None,
        "weights to start from: a .pth or .safetensors file, or torchvision's name for them; with "
        "another number of classes the head is made anew",
        metavar="PATH|NAME",
    )
    freeze_backbone: bool = _option(
        False, "train the head alone; the rest keeps its weights and running statistics"
    )
    epochs: int = _option(10, "passes over the training images (default: 10)", least=1)
    batch: int = _option(
        128,
        "images of a step, of all processes together (default: 128); an epoch is whole batches, "
        "without the images that are left over",
        least=1,
    )
    lr: float = _option(0.1, "learning rate after the warm-up (default: 0.1)", above=0)
    optimizer: str = _option("sgd", "sgd, adamw or rmsprop (default: sgd)", choices=OPTIMIZERS)
    momentum: float = _option(0.9, "of sgd and rmsprop (default: 0.9)", least=0, below=1)
    nesterov: bool = _option(False, "Nesterov's momentum in sgd")
    weight_decay: float = _option(1e-4, "weight decay (default: 1e-4)", least=0)
    schedule: str = _option(
        "cosine",
        "learning rate over the run: steps, cosine or constant (default: cosine)",
        choices=SCHEDULES,
    )
    drops: tuple[float, ...] = _option(
        (0.5, 0.75),
        "where the steps are, as fractions of the run; each divides the rate by 10 (default: "
        "0.5,0.75)",
        least=0,
        below=1,
        metavar="F,...",
    )
    warmup: float = _option(0.0, "epochs of linear warm-up (default: 0)", least=0)
    label_smoothing: float = _option(0.0, "label smoothing (default: 0)", least=0, below=1)
    mixup: float = _option(0.0, "alpha of mixup; 0 is none (default: 0)", least=0)
    augment: bool = _option(True, "random crops and flips of the training images", on="--augment")
    ema: float = _option(
        0.0,
        "decay of an exponential moving average of the weights, which is then what is validated "
        "and kept as the best; 0 is none (default: 0)",
        least=0,
        below=1,
    )
    size: int | None = _option(
        None,
        "height and width of the images (default: 224 for a folder, else the images' own)",
        least=8,
    )
    dtype: str = _option(
        "float32", "float32, bfloat16, float16 (autocast) or float64", choices=DTYPES
    )
    channels_last: bool = _option(
        True, "memory format of images and weights", on="--channels-last", off="--contiguous"
    )
    unfused: bool = _option(False, "PyTorch's own modules, to compare with")
    compile: bool = _option(False, "run the network through torch.compile")
    sync_bn: bool = _option(False, "batch norm over the images of all processes")
    deterministic: bool = _option(
        True,
        "the same bits in every run; on a GPU --no-deterministic is faster",
        on="--deterministic",
    )
    device: str = _option("auto", "auto, cpu or cuda (default: auto)", choices=DEVICES)
    workers: int = _option(0, "processes that read images, per process (default: 0)", least=0)
    seed: int = _option(0, "seed of weights, order and augmentation (default: 0)", least=0)
    save_every: int = _option(
        0, "steps between checkpoints within an epoch; 0 is at its end only", least=0
    )
    resume: bool = _option(False, "go on from the last checkpoint in --out")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = _checked(f.name, getattr(self, f.name), kind_of(f.name), f.metadata)
            object.__setattr__(self, f.name, value)
        for name in ("model", "data", "out"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected one, got nothing")
        if self.nesterov and (self.optimizer != "sgd" or not self.momentum):
            raise ValueError("nesterov: needs the optimizer sgd with a momentum")
        if list(self.drops) != sorted(set(self.drops)):
            raise ValueError(f"drops: expected ascending fractions, got {self.drops}")


#: Settings that change neither the numbers of a run nor its length, so a resumed run may differ.
FREE = ("data", "data_root", "download", "out", "resume", "save_every", "weights", "workers")


def kind_of(name: str) -> tuple[type, bool]:
    """The type of a setting's value, and whether it may be None; a tuple counts as its elements'.

    Args:
        name: Name of the setting.
    """
    hint = typing.get_type_hints(Settings)[name]
    optional = isinstance(hint, types.UnionType)
    if optional:
        hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
    return (hint if isinstance(hint, type) and hint is not tuple else tuple), optional


def from_mapping(values: Mapping[str, Any]) -> Settings:
    """Settings from a recipe's keys and values.

    Args:
        values: Values by the names of :class:`Settings`' attributes, or as the options are spelt.

    Raises:
        ValueError: An unknown key, or a value that is of another type or out of its range.
    """
    named = {key.replace("-", "_"): value for key, value in values.items()}
    known = [f.name for f in dataclasses.fields(Settings)]
    unknown = [key for key in named if key not in known]
    if unknown:
        raise ValueError(f"unknown setting {unknown[0]!r}; expected one of {', '.join(known)}")
    return Settings(**named)


def _checked(name: str, value: Any, kind: tuple[type, bool], meta: Mapping[str, Any]) -> Any:
    expected, optional = kind
    if value is None and optional:
        return None
    if expected is tuple:
        values = value if isinstance(value, list | tuple) else [value]
        return tuple(_checked(name, item, (float, False), meta) for item in values)
    if expected is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:  # YAML reads 1e-4 as a string
            value = float(value)
        except (ValueError, OverflowError):
            raise ValueError(f"{name}: expected a number, got {value!r}") from None
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "a name"}
        raise ValueError(f"{name}: expected {words[expected]}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    if "choices" in meta and value not in meta["choices"]:
        raise ValueError(f"{name}: expected one of {', '.join(meta['choices'])}, got {value!r}")
    bounds = {
        "least": (lambda v, b: v >= b, "at least"),
        "above": (lambda v, b: v > b, "above"),
        "below": (lambda v, b: v < b, "below"),
    }
    for bound, (holds, word) in bounds.items():
        if bound in meta and not holds(value, meta[bound]):
            raise ValueError(f"{name}: expected {word} {meta[bound]}, got {value!r}")
    return value
