"""The name of a network from the network itself, and the proof that the name is right."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..models import sources
from ..models.weights import strip_prefixes

#: Relative difference of the logits, as of rounding in another order.
_LIMIT = 1e-3


def identify(model: nn.Module, network: str | None) -> tuple[str, dict[str, Tensor]]:
    """Find the name of a network, and check that it computes what the model does.

    Args:
        model: A network of torchvision, timm, transformers or this package, fused or not, maybe
            compiled or within ``DataParallel``.
        network: Name of the network if it is known; None to find it.

    Returns:
        The name, for :func:`fused_resnet.models.sources.parse`, and the ``state_dict``.

    Raises:
        ValueError: No name fits, or the named network computes something else.
        MissingPackageError: The network's library is not installed.
    """
    plain: Any = getattr(model, "_orig_mod", model)
    if isinstance(plain, nn.DataParallel | nn.parallel.DistributedDataParallel):
        plain = plain.module
    state, _ = strip_prefixes(plain.state_dict())
    name = sources.parse(network) if network else _named(plain) or _matching(state)
    if name is None:
        raise ValueError(
            "save_frozen: model: is none of the networks that fused-resnet models lists; name it "
            "with network=, or save it with torch.export.export(freeze(model), ...)"
        )
    _check(plain, name, state)
    return name, state


def _named(model: nn.Module) -> str | None:
    """The name that timm and transformers give their models."""
    timm = getattr(model, "pretrained_cfg", None)
    if isinstance(timm, dict) and timm.get("architecture"):
        return sources.parse(f"timm:{timm['architecture']}")
    hub = getattr(getattr(model, "config", None), "_name_or_path", None)
    try:
        return sources.parse(f"hf:{hub}") if hub else None
    except sources.UnknownNetworkError:
        return None


def _matching(state: dict[str, Tensor]) -> str | None:
    """The network with these keys and shapes, of torchvision's and the paper's."""
    shapes = {key: value.shape for key, value in state.items() if "num_batches" not in key}
    for name in (*sources.MODELS, *sources.CIFAR):
        try:
            with torch.device("meta"):
                empty = {key: torch.empty(shape) for key, shape in shapes.items()}
                sources.our_model(name, empty)
        except ValueError:
            continue
        return name
    return None


def _check(model: nn.Module, name: str, state: dict[str, Tensor]) -> None:
    """Compare the logits of one image: a changed stride or activation has the same weights."""
    size = sources.size_of(name)
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    theirs = copy.deepcopy(model).cpu().float().eval()
    state = {key: value.cpu() for key, value in state.items()}
    with torch.no_grad():
        expected: Any = theirs(image)
        expected = getattr(expected, "logits", expected)
        got = sources.our_model(name, state)(image)
    same = isinstance(expected, Tensor) and expected.shape == got.shape
    if not same or not (got - expected).norm() <= _LIMIT * expected.norm():
        raise ValueError(
            f"save_frozen: model: has the weights of {name} but computes something else: a changed "
            "layer, activation or forward can't be stored; use torch.export.export(freeze(model), "
            "...)"
        )
