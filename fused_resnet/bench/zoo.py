"""The networks that ``fused-resnet coverage`` counts: whole families of four libraries.

A name consists of the library and the network, as in :mod:`fused_resnet.models.sources`, and after
a slash a variant: ``torchvision:resnet50``, ``torchvision:resnet50/fpn`` (a detector's backbone,
its batch norms frozen), ``timm:resnet50/features_only``, ``hf:detr/timm/resnet50``,
``smp:Unet/resnet34``. All have random weights, and nothing is downloaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..models import hub
from ..models.optional import library
from ..models.sources import UnknownNetworkError

#: The Python package of each source.
PACKAGES = {
    "torchvision": "torchvision",
    "timm": "timm",
    "hf": "transformers",
    "smp": "segmentation_models_pytorch",
}


@dataclass(frozen=True)
class Family:
    """Networks that share a row.

    Attributes:
        title: The row's title.
        source: A key of :data:`PACKAGES`.
        select: Returns the names of the networks, without their source, given the library.
    """

    title: str
    source: str
    select: Callable[[Any], Iterable[str]]

    def names(self) -> list[str]:
        """The networks of the family that the installed version of the library has.

        Raises:
            MissingPackageError: The library is not installed.
        """
        return [f"{self.source}:{name}" for name in self.select(library(PACKAGES[self.source]))]


#: torchvision's classifiers without a batch norm.
_WITHOUT = ("alexnet", "convnext", "squeezenet", "swin", "vit")


def _classifiers(torchvision: Any) -> list[str]:
    names = torchvision.models.list_models(module=torchvision.models)
    plain_vgg = [n for n in names if n.startswith("vgg") and not n.endswith("_bn")]
    return [n for n in names if not n.startswith(_WITHOUT) and n not in plain_vgg]


def _segmentation(torchvision: Any) -> list[str]:
    return list(torchvision.models.list_models(module=torchvision.models.segmentation))


#: torchvision's detectors on a VGG without batch norm.
_VGG_DETECTORS = ("ssd300_vgg16",)

_FPN_BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def _detection(torchvision: Any) -> list[str]:
    whole = torchvision.models.list_models(module=torchvision.models.detection)
    frozen = [f"{name}/fpn" for name in _FPN_BACKBONES]
    return [name for name in whole if name not in _VGG_DETECTORS] + frozen


def _timm(module: str, kind: str = "") -> Callable[[Any], list[str]]:
    """Selects a timm module's networks with batch norms, of its ResNets those of one kind."""

    def select(timm: Any) -> list[str]:
        names = [n for n in timm.list_models(module=module) if not n.endswith("_gn")]
        return [name for name in names if not kind or _kind_of_resnet(name) == kind]

    return select


def _kind_of_resnet(name: str) -> str:
    if any(mark in name for mark in ("blur", "netaa", "nextaa")):
        return "blur"
    for start, kind in (("se", "senet"), ("eca", "eca"), ("wide", "wide"), ("resnext", "resnext")):
        if name.startswith(start):
            return kind
    return "resnet"


#: One of each family, and two where the depth changes the block.
_FEATURES = (
    "resnet18", "resnet50", "resnet50d", "resnext50_32x4d", "wide_resnet50_2", "seresnet50",
    "ecaresnet50d", "resnetblur50", "resnetaa50", "resnest50d", "res2net50_26w_4s", "regnetx_002",
    "regnety_002", "dla34", "dla60", "hrnet_w18_small", "hrnet_w18", "skresnet18", "skresnet50",
)  # fmt: skip

_ENCODERS = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d",
    "resnext101_32x8d", "se_resnet50", "se_resnext50_32x4d", "timm-skresnet18",
)  # fmt: skip

_DECODERS = (
    "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "DeepLabV3", "DeepLabV3Plus", "PAN",
    "UPerNet", "Segformer",
)  # fmt: skip


def _segmentation_models(_: Any) -> list[str]:
    others = [f"{decoder}/{e}" for decoder in _DECODERS for e in ("resnet34", "resnet50")]
    return [f"Unet/{encoder}" for encoder in _ENCODERS] + others


FAMILIES = (
    Family("torchvision, classification", "torchvision", _classifiers),
    Family("torchvision, segmentation", "torchvision", _segmentation),
    Family("torchvision, detection", "torchvision", _detection),
    Family("timm ResNet (c, d, s, t, RS)", "timm", _timm("resnet", "resnet")),
    Family("timm ResNeXt", "timm", _timm("resnet", "resnext")),
    Family("timm wide ResNet", "timm", _timm("resnet", "wide")),
    Family("timm SENet, SE-ResNet", "timm", _timm("resnet", "senet")),
    Family("timm ECA-ResNet", "timm", _timm("resnet", "eca")),
    Family("timm blurred and anti-aliased", "timm", _timm("resnet", "blur")),
    Family("timm ResNeSt", "timm", _timm("resnest")),
    Family("timm Res2Net", "timm", _timm("res2net")),
    Family("timm RegNet", "timm", _timm("regnet")),
    Family("timm DLA", "timm", _timm("dla")),
    Family("timm HRNet", "timm", _timm("hrnet")),
    Family("timm SKNet", "timm", _timm("sknet")),
    Family("timm features_only", "timm", lambda _: [f"{n}/features_only" for n in _FEATURES]),
    Family("transformers ResNet", "hf", lambda _: [*hub.RESNETS, *hub.VARIANTS]),
    Family("transformers RegNet", "hf", lambda _: hub.REGNETS),
    Family("transformers, DETR's backbones", "hf", lambda _: hub.BACKBONES),
    Family("segmentation-models-pytorch", "smp", _segmentation_models),
)


def family_of(name: str) -> str:
    """The title of a network's family; empty if it is in none.

    Args:
        name: The network's name, with its source.

    Raises:
        MissingPackageError: Its library is not installed.
    """
    own = (family for family in FAMILIES if name.startswith(f"{family.source}:"))
    return next((family.title for family in own if name in family.names()), "")


def build(name: str) -> nn.Module:
    """A network with random weights, in eval mode.

    Args:
        name: A name that a family lists, or of another network of the library.

    Raises:
        UnknownNetworkError: No such source, or the library has no such network.
        MissingPackageError: Its library is not installed.
    """
    source, _, rest = name.partition(":")
    if source not in PACKAGES or not rest:
        raise UnknownNetworkError(
            f"unknown network {name!r}; expected {', '.join(PACKAGES)}, a colon and a name"
        )
    package = library(PACKAGES[source])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about initial weights
        model = _BUILDERS[source](package, rest)
    if model is None:
        raise UnknownNetworkError(f"unknown network {name!r}: {package.__name__} has none")
    return model.eval()


def build_without_memory(name: str) -> nn.Module:
    """The network on the meta device, where its code runs without data.

    Args:
        name: A name that a family lists, or of another network of the library.
    """
    try:
        with torch.device("meta"):
            return build(name)
    except NotImplementedError:
        return build(name)  # its constructor needs data, as those of torchvision's RegNets do


def _torchvision(package: Any, name: str) -> nn.Module | None:
    base, _, variant = name.partition("/")
    models = package.models
    if variant == "fpn" and base in _FPN_BACKBONES:
        fpn: nn.Module = models.detection.backbone_utils.resnet_fpn_backbone(
            backbone_name=base, weights=None
        )
        return fpn
    if variant or name not in models.list_models():
        return None
    dense = name in _segmentation(package) or name in models.list_models(module=models.detection)
    model: nn.Module = models.get_model(
        name, weights=None, **({"weights_backbone": None} if dense else {})
    )
    return model


def _of_timm(package: Any, name: str) -> nn.Module | None:
    base, _, variant = name.partition("/")
    if variant not in ("", "features_only") or not package.is_model(base):
        return None
    model: nn.Module = package.create_model(base, features_only=bool(variant))
    return model


def _hub(package: Any, name: str) -> nn.Module | None:
    return hub.build(package, name) if name in hub.NAMES else None


def _smp(package: Any, name: str) -> nn.Module | None:
    decoder, _, encoder = name.partition("/")
    if encoder not in package.encoders.get_encoder_names() or not hasattr(package, decoder):
        return None
    model: nn.Module = getattr(package, decoder)(encoder, encoder_weights=None)
    return model


_BUILDERS: dict[str, Callable[[Any, str], nn.Module | None]] = {
    "torchvision": _torchvision,
    "timm": _of_timm,
    "hf": _hub,
    "smp": _smp,
}
