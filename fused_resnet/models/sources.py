"""Builds networks of other libraries by name, with random weights and without a download.

A name is ``source:name``: ``torchvision:resnet50`` (or ``resnet50``), ``timm:resnet50``,
``hf:microsoft/resnet-50``; or the paper's ``cifar_resnet56`` and its counterpart without shortcuts,
``cifar_plain56``. Each is the plain PyTorch model of its library.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from . import hub
from .cifar import DEPTHS, cifar_resnet
from .optional import MissingPackageError, library
from .unfused_cifar import UnfusedCifarResNet
from .weights import load_into

#: torchvision's residual networks, which this package has too.
MODELS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)

#: The paper's networks for images of 32x32, with shortcuts and without.
CIFAR = tuple(f"cifar_{kind}{depth}" for kind in ("resnet", "plain") for depth in DEPTHS)


class UnknownNetworkError(ValueError):
    """An unknown network; the message lists the known ones."""


def parse(text: str) -> str:
    """Check the name of a network and normalise it.

    Args:
        text: ``source:name``, or only the name for torchvision's and this package's networks.

    Returns:
        ``source:name``; only the name for torchvision's and this package's networks.

    Raises:
        UnknownNetworkError: An unknown source or network.
    """
    source, separator, name = text.partition(":")
    if not separator:
        source, name = "torchvision", text
    if source == "torchvision":
        if name not in (*MODELS, *CIFAR):
            raise UnknownNetworkError(_unknown(text, name, (*MODELS, *CIFAR)))
        return name
    if source == "hf":
        known = (*hub.RESNETS, *hub.REGNETS)
        if name not in known:
            raise UnknownNetworkError(_unknown(text, name, known))
    elif source == "timm":
        timm = library("timm")
        if not timm.is_model(name):
            raise UnknownNetworkError(_unknown(text, name, timm.list_models()))
    else:
        raise UnknownNetworkError(
            f"unknown source {source!r}; expected torchvision, timm or hf before the colon"
        )
    return text


def _unknown(text: str, name: str, known: Sequence[str]) -> str:
    """The error of an unknown name, with the nearest known ones."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.7)
    source = text[: len(text) - len(name)]
    if near:
        advice = f"did you mean {' or '.join(source + found for found in near)}?"
    elif len(known) <= 20:
        advice = f"expected one of {', '.join(known)}"
    else:
        advice = "fused-resnet models lists the known ones"
    return f"unknown model {text!r}; {advice}"


def size_of(name: str) -> int:
    """Height and width of the images that a network is made for.

    Args:
        name: Name of the network, as :func:`parse` returns it.
    """
    return 32 if name in CIFAR else 224


def torchvision_model(
    name: str, state: dict[str, Tensor] | None = None, classes: int | None = None
) -> nn.Module:
    """A network of torchvision in eval mode.

    Args:
        name: One of :data:`MODELS`.
        state: State dict of the network; None for the initial parameters.
        classes: Number of classes; None for that of ``state``, or 1000 without one.

    Raises:
        ValueError: The state dict does not fit the network.
        MissingPackageError: torchvision is not installed.
    """
    try:
        import torchvision
    except ImportError:
        raise MissingPackageError("torchvision") from None
    if classes is None:
        classes = state["fc.bias"].numel() if state is not None and "fc.bias" in state else 1000
    model: nn.Module = getattr(torchvision.models, name)(num_classes=classes)
    if state is not None:
        load_into(model, state, name=name)
    return model.eval()


def plain_model(
    name: str, state: dict[str, Tensor] | None = None, classes: int | None = None
) -> nn.Module:
    """The network as its own library builds it, in eval mode.

    Args:
        name: Name of the network, as :func:`parse` returns it.
        state: State dict of the network; None for the initial parameters.
        classes: Number of classes; None for that of ``state``, or the default number without one.

    Raises:
        ValueError: The state dict does not fit the network.
        MissingPackageError: Its library is not installed.
    """
    source, _, rest = name.rpartition(":")
    if not source and name not in CIFAR:
        return torchvision_model(name, state, classes)
    classes = _classes(name, state, classes)
    model: nn.Module
    if source == "timm":
        model = library("timm").create_model(rest, pretrained=False, num_classes=classes)
    elif source == "hf":
        model = hub.build(library("transformers"), rest, classes)
    else:
        depth, residual = _cifar(name)
        model = UnfusedCifarResNet(depth, residual, classes)
    if state is not None:
        load_into(model, state, name=name)
    return model.eval()


def head_of(name: str) -> tuple[str, ...]:
    """The paths that a network's classifier has in a state dict; the first is the model's own.

    Args:
        name: The network, from :func:`parse`.
    """
    source, _, rest = name.rpartition(":")
    if source == "timm":
        return (library("timm").get_pretrained_cfg_value(rest, "classifier") or "fc",)
    if source == "hf":
        return ("model.classifier.1", "classifier.1")  # this package's wrapper, and the Hub's keys
    return ("linear" if name in CIFAR else "fc",)


def classes_of(name: str, state: Mapping[str, Tensor]) -> int:
    """The number of classes of a state dict: the length of its classifier's bias.

    Args:
        name: The network, from :func:`parse`.
        state: The state dict.

    Raises:
        ValueError: The state dict has no such bias, so it does not fit the network.
    """
    heads = [f"{head}.bias" for head in head_of(name)]
    for head in heads:
        if head in state:
            return state[head].numel()
    raise ValueError(f"{name}: weights do not fit: no {' or '.join(heads)} among them")


def our_model(
    name: str, state: dict[str, Tensor] | None = None, classes: int | None = None
) -> nn.Module:
    """The network to fuse: this package's CIFAR network, else :func:`plain_model`.

    Args:
        name: Name of the network, as :func:`parse` returns it.
        state: State dict of the network; None for the initial parameters.
        classes: Number of classes; None for that of ``state``, or the default number without one.

    Raises:
        ValueError: The state dict does not fit the network.
        MissingPackageError: The network's library is not installed.
    """
    if name not in CIFAR:
        return plain_model(name, state, classes)
    classes = _classes(name, state, classes)
    depth, residual = _cifar(name)
    return cifar_resnet(depth, residual, num_classes=classes, weights=state).eval()


def _classes(name: str, state: Mapping[str, Tensor] | None, classes: int | None) -> int:
    """``classes`` where they are given, else those of the weights, else the default number."""
    if classes is not None:
        return classes
    if state is not None:
        return classes_of(name, state)
    return 10 if name in CIFAR else 1000


def _cifar(name: str) -> tuple[int, bool]:
    """Depth, and whether there are shortcuts."""
    kind = name.removeprefix("cifar_").rstrip("0123456789")
    return int(name.removeprefix(f"cifar_{kind}")), kind == "resnet"
