"""Networks with a ResNet inside, fused models under torch.compile, export and tracing."""

from __future__ import annotations

import pytest
import torch
from networks import image, randomize
from torch import Tensor, nn

import fused_resnet as fr

tv = pytest.importorskip("torchvision", reason="torchvision's networks are what is fused here")
from torchvision.models import resnet as tv_resnet  # noqa: E402
from torchvision.models._utils import IntermediateLayerGetter  # noqa: E402
from torchvision.models.feature_extraction import create_feature_extractor  # noqa: E402
from torchvision.models.segmentation.fcn import FCN, FCNHead  # noqa: E402
from torchvision_networks import assert_fused_equals_eager, small  # noqa: E402


def test_segmentation_network() -> None:
    backbone = IntermediateLayerGetter(
        small(replace_stride_with_dilation=[False, True, True]), {"layer3": "aux", "layer4": "out"}
    )
    model = FCN(backbone, FCNHead(256, 5).double(), FCNHead(128, 5).double())
    for head in (model.classifier, model.aux_classifier):
        head[3] = nn.Identity()  # dropout is random
    fused = assert_fused_equals_eager(randomize(model), image(2, 3, 33, 32))
    found = fr.report(fused)
    assert ("backbone.conv1", "conv_bn_relu_maxpool") in found.fused
    assert ("classifier.0", "conv_bn_add_relu") in found.fused
    assert found.left == []


@pytest.mark.parametrize(
    "build", [tv.models.segmentation.fcn_resnet50, tv.models.segmentation.deeplabv3_resnet101]
)
def test_torchvisions_segmentation_models_are_fused(build) -> None:
    with torch.device("meta"):
        model = build(weights=None, weights_backbone=None, aux_loss=True)
    found = fr.report(fr.fuse(model))
    assert len(found.fused) == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert found.left == []


@pytest.mark.parametrize("stop", ["conv1", "bn1", "relu", "maxpool"])
def test_layer_getter_returns_every_intermediate(stop: str) -> None:
    getter = IntermediateLayerGetter(small(), {stop: "early", "layer1": "late"})
    fused = assert_fused_equals_eager(getter, image(2, 3, 24, 20))
    y = fused(image(1, 3, 24, 20))
    assert list(y) == ["early", "late"]
    assert type(y) is type(getter(image(1, 3, 24, 20)))


def test_detection_body_with_frozen_batch_norm() -> None:
    model = tv.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    backbone = randomize(model.backbone).eval()
    fused = fr.fuse(backbone)
    x = image(1, 3, 33, 29, dtype=torch.float32)
    with torch.no_grad():
        expected, got = backbone(x), fused(x)
    for name, truth in expected.items():
        torch.testing.assert_close(got[name], truth, rtol=1e-4, atol=1e-4)
    found = fr.report(fused)
    assert (len(found.fused), found.left) == (53, [])


def test_sequential_runs() -> None:
    def layers() -> nn.Sequential:
        torch.manual_seed(4)
        return randomize(
            nn.Sequential(
                nn.ReLU(inplace=True),
                nn.BatchNorm2d(4),
                nn.ReLU(inplace=True),
                nn.Conv2d(4, 6, 3, bias=True),
                nn.BatchNorm2d(6),
                nn.ReLU6(inplace=True),
                nn.Conv2d(6, 6, 3),
                nn.ReLU(),
                nn.BatchNorm2d(6),
                nn.Conv2d(6, 5, 1),
                nn.MaxPool2d(2),
                nn.BatchNorm2d(5),
                nn.ReLU(),
                nn.Conv2d(5, 5, 1),
                nn.BatchNorm2d(5),
            )
        ).double()

    # In-place ReLU at the head changes the input itself; `+ 0` keeps the leaf out of its way.
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = layers()

        def forward(self, x: Tensor) -> Tensor:
            kept = x + 0
            return self.body(kept).mean((2, 3)) + kept.mean((2, 3))[:, :1]

    fused = assert_fused_equals_eager(Wrapped(), image(3, 4, 12, 12))
    found = fr.report(fused)
    assert found.fused == [
        ("body.1", "bn_add_relu"),
        ("body.3", "conv_bn_add_relu"),
        ("body.11", "bn_add_relu"),
        ("body.13", "conv_bn_add_relu"),
    ]
    assert [path for path, _ in found.left] == ["body.8"]  # conv, ReLU, then BN is another thing


def test_native_networks_report_as_fused() -> None:
    model = fr.resnet18(num_classes=4)
    assert fr.report(model) == fr.report(fr.fuse(tv.models.resnet18(num_classes=4)))
    assert len(fr.report(fr.cifar_resnet(20, shortcut="B")).fused) == 19 + 2


def test_compile_gives_one_graph_and_the_same_numbers() -> None:
    model = small(tv_resnet.BasicBlock, (1, 1, 1, 1))
    compiled = torch.compile(fr.fuse(model), fullgraph=True, backend="aot_eager")
    x = image(1, 3, 33, 29)
    torch.testing.assert_close(compiled(x), model(x))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


def test_export_of_a_fused_network() -> None:
    model = small(tv_resnet.BasicBlock, (1, 1, 1, 1))
    x = image(2, 3, 33, 29)
    program = torch.export.export(fr.fuse(model), (x,))
    torch.testing.assert_close(program.module()(x), model(x))
    assert any("fused_resnet" in str(node.target) for node in program.graph.nodes)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
def test_fx_and_jit_trace_a_fused_network() -> None:
    model = small(tv_resnet.BasicBlock, (1, 1, 1, 1))
    fused = fr.fuse(model)
    x = image(2, 3, 33, 29)
    torch.testing.assert_close(torch.fx.symbolic_trace(fused)(x), model(x))
    features = create_feature_extractor(fused, ["layer2.0.bn1"])
    original = create_feature_extractor(model, ["layer2.0.bn1"])
    torch.testing.assert_close(features(x), original(x))
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(fused, x)(x), model(x))


def test_functional_call_uses_its_parameters() -> None:
    model = small()
    other = {k: v * 0.9 for k, v in model.state_dict().items() if v.is_floating_point()}
    x = image(1, 3, 33, 29)
    torch.testing.assert_close(
        torch.func.functional_call(fr.fuse(model), other, (x,)),
        torch.func.functional_call(model, other, (x,)),
    )


def test_every_available_backend_gives_the_same_result() -> None:
    fused, model = fr.fuse(small()), small()
    x = image(1, 3, 33, 29)
    ran = []
    for name, status in fr.backends().items():
        if not status or name == "cuda":
            continue
        with fr.use_backend(name):
            torch.testing.assert_close(fused(x), model(x))
        ran.append(name)
    assert {"reference", "cpu"} <= set(ran)
