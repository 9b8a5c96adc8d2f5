"""Networks of ``transformers`` with the configurations of models on the Hugging Face Hub.

Nothing is downloaded: a name selects a configuration, and the parameters are random.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor, nn

#: The Hub's ResNets: kind of block, and blocks in each stage.
RESNETS = {
    "microsoft/resnet-18": ("basic", (2, 2, 2, 2)),
    "microsoft/resnet-26": ("bottleneck", (2, 2, 2, 2)),
    "microsoft/resnet-34": ("basic", (3, 4, 6, 3)),
    "microsoft/resnet-50": ("bottleneck", (3, 4, 6, 3)),
    "microsoft/resnet-101": ("bottleneck", (3, 4, 23, 3)),
    "microsoft/resnet-152": ("bottleneck", (3, 8, 36, 3)),
}

#: The Hub's RegNets: blocks in each stage, widths, and channels of a convolution's group; the name
#: has the variant, x or y.
REGNETS = {
    "facebook/regnet-x-002": ((1, 1, 4, 7), (24, 56, 152, 368), 8),
    "facebook/regnet-x-004": ((1, 2, 7, 12), (32, 64, 160, 384), 16),
    "facebook/regnet-x-006": ((1, 3, 5, 7), (48, 96, 240, 528), 24),
    "facebook/regnet-x-008": ((1, 3, 7, 5), (64, 128, 288, 672), 16),
    "facebook/regnet-x-016": ((2, 4, 10, 2), (72, 168, 408, 912), 24),
    "facebook/regnet-x-032": ((2, 6, 15, 2), (96, 192, 432, 1008), 48),
    "facebook/regnet-x-040": ((2, 5, 14, 2), (80, 240, 560, 1360), 40),
    "facebook/regnet-x-064": ((2, 4, 10, 1), (168, 392, 784, 1624), 56),
    "facebook/regnet-x-080": ((2, 5, 15, 1), (80, 240, 720, 1920), 120),
    "facebook/regnet-x-120": ((2, 5, 11, 1), (224, 448, 896, 2240), 112),
    "facebook/regnet-x-160": ((2, 6, 13, 1), (256, 512, 896, 2048), 128),
    "facebook/regnet-x-320": ((2, 7, 13, 1), (336, 672, 1344, 2520), 168),
    "facebook/regnet-y-002": ((1, 1, 4, 7), (24, 56, 152, 368), 8),
    "facebook/regnet-y-004": ((1, 3, 6, 6), (48, 104, 208, 440), 8),
    "facebook/regnet-y-006": ((1, 3, 7, 4), (48, 112, 256, 608), 16),
    "facebook/regnet-y-008": ((1, 3, 8, 2), (64, 128, 320, 768), 16),
    "facebook/regnet-y-016": ((2, 6, 17, 2), (48, 120, 336, 888), 24),
    "facebook/regnet-y-032": ((2, 5, 13, 1), (72, 216, 576, 1512), 24),
    "facebook/regnet-y-040": ((2, 6, 12, 2), (128, 192, 512, 1088), 64),
    "facebook/regnet-y-064": ((2, 7, 14, 2), (144, 288, 576, 1296), 72),
    "facebook/regnet-y-080": ((2, 4, 10, 1), (168, 448, 896, 2016), 56),
    "facebook/regnet-y-120": ((2, 5, 11, 1), (224, 448, 896, 2240), 112),
    "facebook/regnet-y-160": ((2, 4, 11, 1), (224, 448, 1232, 3024), 112),
    "facebook/regnet-y-320": ((2, 5, 12, 1), (232, 696, 1392, 3712), 232),
    "facebook/regnet-y-640-seer": ((2, 5, 12, 1), (328, 984, 1968, 4920), 328),
    "facebook/regnet-y-1280-seer": ((2, 7, 17, 1), (528, 1056, 2904, 7392), 264),
}

#: Options of a ResNet's configuration for the position of strides.
_OPTIONS = ("downsample_in_first_stage", "downsample_in_bottleneck")

#: A ResNet of each kind of block with none, each and both of these options: ``resnet-basic``,
#: ``resnet-basic+downsample_in_first_stage``, and so on.
VARIANTS = tuple(
    "+".join((f"resnet-{block}", *options))
    for block in ("basic", "bottleneck")
    for options in ((), _OPTIONS[:1], _OPTIONS[1:], _OPTIONS)
)

#: Detection models whose backbone is a ResNet with frozen batch norms.
_DETECTORS = ("detr", "conditional_detr", "deformable_detr", "dab_detr", "table_transformer")

#: Their backbones, from ``timm`` and from ``transformers``: ``detr/timm/resnet50``.
BACKBONES = tuple(
    f"{detector}/{backbone}"
    for detector in _DETECTORS
    for backbone in ("timm/resnet50", "timm/resnet101", "microsoft/resnet-50")
)

#: All names that :func:`build` accepts.
NAMES = (*RESNETS, *VARIANTS, *REGNETS, *BACKBONES)


class Logits(nn.Module):
    """A classifier of ``transformers`` that returns its logits only.

    Args:
        model: The classifier.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Classify images.

        Args:
            x: Images, ``(N, 3, H, W)``.

        Returns:
            Logits, ``(N, classes)``.
        """
        logits: Tensor = self.model(x, return_dict=False)[0]
        return logits


def build(library: Any, name: str, classes: int = 1000) -> nn.Module:
    """Build a classifier, or the backbone of a detector, with random parameters.

    Args:
        library: The module ``transformers``.
        name: One of :data:`NAMES`.
        classes: Number of classes of a classifier.
    """
    if name in BACKBONES:
        return _backbone(library, name)
    if name in REGNETS:
        depths, widths, group = REGNETS[name]
        config = library.RegNetConfig(
            depths=list(depths),
            hidden_sizes=list(widths),
            groups_width=group,
            layer_type=name.split("-")[1],
            num_labels=classes,
        )
        return Logits(library.RegNetForImageClassification(config))
    return Logits(library.ResNetForImageClassification(_resnet(library, name, num_labels=classes)))


def _resnet(library: Any, name: str, **others: Any) -> Any:
    title, *options = name.split("+")
    block, depths = RESNETS.get(name, (title.removeprefix("resnet-"), (2, 2, 2, 2)))
    widths = [64, 128, 256, 512] if block == "basic" else [256, 512, 1024, 2048]
    return library.ResNetConfig(
        layer_type=block,
        depths=list(depths),
        hidden_sizes=widths,
        **dict.fromkeys(options, True),
        **others,
    )


def _backbone(library: Any, name: str) -> nn.Module:
    detector, _, backbone = name.partition("/")
    if backbone.startswith("timm/"):
        inner = library.TimmBackboneConfig(
            backbone=backbone.removeprefix("timm/"), features_only=True, out_indices=[1, 2, 3, 4]
        )
    else:
        inner = _resnet(library, backbone, out_features=["stage2", "stage3", "stage4"])
    title = "".join(map(str.capitalize, detector.split("_")))
    config = getattr(library, f"{title}Config")(backbone_config=inner)
    home = importlib.import_module(f"transformers.models.{detector}.modeling_{detector}")
    encoder: nn.Module = getattr(home, f"{title}ConvEncoder")(config)
    return encoder.get_submodule("model")
