"""The networks that a benchmark can build, all with random weights and without a download.

A network is named by a source and a name: ``torchvision:resnet50`` (which is what ``resnet50``
means), ``timm:resnet50``, ``hf:microsoft/resnet-50``, and ``cifar_resnet56`` of the paper. Each is
the plain PyTorch model of its library, for this package's :func:`~fused_resnet.freeze` as for all
others.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from . import hub
from .cifar import cifar_resnet
from .optional import MissingPackageError, library
from .unfused_cifar import PlainCifarResNet
from .weights import load_into

#: torchvision's residual networks, which are also ours.
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

#: The paper's networks for images of 32x32.
CIFAR = tuple(f"cifar_resnet{depth}" for depth in (20, 32, 44, 56, 110))


class UnknownNetworkError(ValueError):
    """No such network; the message says which there are."""


def parse(text: str) -> str:
    """The name in full, ``source:name``; torchvision's and this package's names stay short.

    Raises:
        UnknownNetworkError: No such source, or it has no such network.
    """
    source, separator, name = text.partition(":")
    if not separator:
        source, name = "torchvision", text
    if source == "torchvision":
        if name not in (*MODELS, *CIFAR):
            raise UnknownNetworkError(
                f"unknown model {name!r}; expected one of {', '.join((*MODELS, *CIFAR))}"
            )
        return name
    if source == "hf":
        known = (*hub.RESNETS, *hub.REGNETS)
        if name not in known:
            raise UnknownNetworkError(
                f"unknown model {text!r}; expected hf: and {', '.join(known)}"
            )
    elif source == "timm":
        if not library("timm").is_model(name):
            raise UnknownNetworkError(f"unknown model {text!r}: timm has no such network")
    else:
        raise UnknownNetworkError(f"unknown source {source!r}; expected torchvision, timm or hf")
    return text


def size_of(name: str) -> int:
    """Height and width of the images that the network is for."""
    return 32 if name in CIFAR else 224


def torchvision_model(name: str, state: dict[str, Tensor] | None = None) -> nn.Module:
    """torchvision's network of that name, in eval.

    Args:
        name: One of :data:`MODELS`.
        state: Its state dict, which also tells the number of classes; None leaves the initial
            parameters.

    Raises:
        ValueError: The state dict is not that network's.
        MissingPackageError: torchvision is not installed.
    """
    try:
        import torchvision
    except ImportError:
        raise MissingPackageError("torchvision") from None
    classes = state["fc.bias"].numel() if state is not None and "fc.bias" in state else 1000
    model: nn.Module = getattr(torchvision.models, name)(num_classes=classes)
    if state is not None:
        load_into(model, state, name=name)
    return model.eval()


def plain_model(name: str, state: dict[str, Tensor] | None = None) -> nn.Module:
    """The network of its own library, in eval.

    Args:
        name: From :func:`parse`.
        state: Its state dict, which also tells the number of classes; None leaves the initial
            parameters.

    Raises:
        ValueError: The state dict is not that network's.
        MissingPackageError: Its library is not installed.
    """
    source, _, rest = name.rpartition(":")
    if not source and name not in CIFAR:
        return torchvision_model(name, state)
    model: nn.Module
    if source == "timm":
        classes = 1000 if state is None else classes_of(name, state)
        model = library("timm").create_model(rest, pretrained=False, num_classes=classes)
    elif source == "hf":
        classes = 1000 if state is None else classes_of(name, state)
        model = hub.build(library("transformers"), rest, classes)
        if state is not None and not any(key.startswith("model.") for key in state):
            state = {f"model.{key}": value for key, value in state.items()}  # the Hub's own keys
    else:
        model = PlainCifarResNet(_depth(name))
    if state is not None:
        load_into(model, state, name=name)
    return model.eval()


def classes_of(name: str, state: Mapping[str, Tensor]) -> int:
    """How many classes a state dict of the network has: the length of its last bias.

    Raises:
        ValueError: It has no such bias, and so is not the network's.
    """
    source, _, rest = name.rpartition(":")
    if source == "timm":
        heads = [f"{library('timm').get_pretrained_cfg_value(rest, 'classifier') or 'fc'}.bias"]
    elif source == "hf":
        heads = ["model.classifier.1.bias", "classifier.1.bias"]
    else:
        heads = ["linear.bias" if name in CIFAR else "fc.bias"]
    for head in heads:
        if head in state:
            return state[head].numel()
    raise ValueError(f"{name}: weights do not fit: no {' or '.join(heads)} among them")


def our_model(name: str, state: dict[str, Tensor] | None = None) -> nn.Module:
    """What this package is given to fuse: its own CIFAR network, else :func:`plain_model`."""
    if name not in CIFAR:
        return plain_model(name, state)
    return cifar_resnet(_depth(name), weights=state).eval()


def _depth(name: str) -> int:
    return int(name.removeprefix("cifar_resnet"))
