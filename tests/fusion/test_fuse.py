"""fuse: the numbers of the unfused model, whatever the model does; and report, which says so."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import threading

import pytest
import torch
from networks import assert_same, image, randomize, results
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import fused_resnet as fr

tv = pytest.importorskip("torchvision", reason="torchvision's networks are what is fused here")
from torchvision.models import resnet as tv_resnet  # noqa: E402
from torchvision.models._utils import IntermediateLayerGetter  # noqa: E402
from torchvision.models.feature_extraction import create_feature_extractor  # noqa: E402
from torchvision.models.segmentation.fcn import FCN, FCNHead  # noqa: E402
from torchvision.ops.misc import FrozenBatchNorm2d  # noqa: E402


class Slim(tv_resnet.ResNet):
    """torchvision's ResNet, its stages an eighth as wide, to be quick in float64."""

    def _make_layer(self, block, planes, *args, **kwargs) -> nn.Sequential:
        return super()._make_layer(block, planes // 8, *args, **kwargs)

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.fc = nn.Linear(self.inplanes, 10)


def small(
    block: type[nn.Module] = tv_resnet.Bottleneck,
    layers: tuple[int, ...] = (1, 1, 1, 1),
    kind: type[nn.Module] = Slim,
    **kwargs,
) -> nn.Module:
    """The same network at every call, with random statistics, in float64 and eval mode."""
    torch.manual_seed(0)
    return randomize(kind(block, list(layers), **kwargs)).double().eval()


def assert_fused_means_the_same(model: nn.Module, x: Tensor, limit: float = 1e-9) -> nn.Module:
    """One call in eval and two in training; returns the fused model."""
    untouched = copy.deepcopy(model)
    fused = fr.fuse(copy.deepcopy(model))
    assert_same(results(fused.eval(), x), results(untouched.eval(), x), limit)
    for _ in range(2):
        assert_same(results(fused.train(), x), results(untouched.train(), x), limit)
    return fused


FAMILY = {
    "basic": dict(block=tv_resnet.BasicBlock),
    "bottleneck": dict(layers=(1, 2, 1, 1)),
    "resnext": dict(groups=4, width_per_group=8),
    "wide": dict(width_per_group=128),
    "dilated": dict(replace_stride_with_dilation=[False, True, True]),
    "zero init": dict(zero_init_residual=True),
    "eps and momentum": dict(norm_layer=functools.partial(nn.BatchNorm2d, eps=1e-3, momentum=0.3)),
    "cumulative average": dict(norm_layer=functools.partial(nn.BatchNorm2d, momentum=None)),
    "no statistics": dict(norm_layer=functools.partial(nn.BatchNorm2d, track_running_stats=False)),
    "frozen batch norm": dict(norm_layer=FrozenBatchNorm2d),
}


@pytest.mark.parametrize("name", FAMILY)
def test_torchvision_family(name: str) -> None:
    fused = assert_fused_means_the_same(small(**FAMILY[name]), image(2, 3, 33, 29))
    found = fr.report(fused)
    norms = [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d | FrozenBatchNorm2d)]
    assert len(found.fused) == len(norms)
    assert found.left == []
    assert found.counts["conv_bn_relu_maxpool"] == 1


def test_fusing_shares_parameters_and_leaves_the_original_alone() -> None:
    model = small()
    classes = [type(m) for m in model.modules()]
    fused = fr.fuse(model)
    assert [type(m) for m in model.modules()] == classes
    assert list(fused.state_dict()) == list(model.state_dict())
    for (name, ours), (_, theirs) in zip(
        [*fused.named_parameters(), *fused.named_buffers()],
        [*model.named_parameters(), *model.named_buffers()],
        strict=True,
    ):
        assert ours is theirs, name
    assert isinstance(fused, tv_resnet.ResNet)
    assert isinstance(fused.get_submodule("layer2.0"), tv_resnet.Bottleneck)
    fused.train()
    assert not model.training


def test_an_optimizer_built_before_trains_the_fused_model() -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    fused = fr.fuse(model).train()
    before = fused(image(2, 3, 33, 29)).detach()
    fused(image(2, 3, 33, 29)).sum().backward()
    optimizer.step()
    model.train()
    after = fused(image(2, 3, 33, 29))
    torch.testing.assert_close(after, model(image(2, 3, 33, 29)))
    assert not torch.allclose(before, after)


def test_nothing_is_kept_from_call_to_call() -> None:
    model = small()
    fused = fr.fuse(model)
    x = image(1, 3, 33, 29)
    fused(x)
    with torch.no_grad():
        for p in model.parameters():
            p.data.mul_(0.9)
        model.layer1[0].bn1.running_var.mul_(2)
    model.layer4[0].conv2.dilation, model.layer4[0].conv2.padding = (2, 2), (2, 2)
    fused.layer4[0].conv2.dilation, fused.layer4[0].conv2.padding = (2, 2), (2, 2)
    torch.testing.assert_close(fused(x), model(x))


def test_fusing_twice_changes_nothing() -> None:
    once = fr.fuse(small())
    twice = fr.fuse(once)
    assert [type(m) for m in twice.modules()] == [type(m) for m in once.modules()]
    assert torch.equal(twice(image(1, 3, 33, 29)), once(image(1, 3, 33, 29)))
    assert fr.report(twice) == fr.report(once)


def test_state_dicts_go_both_ways() -> None:
    fused, other = fr.fuse(small()), small()
    randomize(other, seed=9)
    x = image(1, 3, 33, 29)
    assert not torch.allclose(fused(x), other(x))
    fused.load_state_dict(other.state_dict())
    torch.testing.assert_close(fused(x), other(x))
    other.load_state_dict(fr.fuse(small()).state_dict())


def test_copies_and_pickles_stay_fused() -> None:
    fused = fr.fuse(small())
    x = image(1, 3, 33, 29)
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (loaded, pickle.loads(pickle.dumps(fused)), copy.deepcopy(fused)):
        assert [type(m) for m in other.modules()] == [type(m) for m in fused.modules()]
        assert torch.equal(other(x), fused(x))
        assert fr.report(other) == fr.report(fused)
        assert other.conv1.weight is not fused.conv1.weight


# Blocks of others


class Named(tv_resnet.BasicBlock):
    """Keeps the forward, adds a method."""

    def name(self) -> str:
        return "named"


class PostAdd(tv_resnet.BasicBlock):
    """Adds after the activation: not torchvision's block."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        return y + (x if self.downsample is None else self.downsample(x))


class Doubled(Slim):
    """Its own _forward_impl."""

    def _forward_impl(self, x: Tensor) -> Tensor:
        return 2 * super()._forward_impl(x)


def test_a_subclass_that_keeps_the_forward_is_fused() -> None:
    fused = assert_fused_means_the_same(small(Named), image(2, 3, 33, 29))
    assert isinstance(fused.layer1[0], Named)
    assert fused.layer1[0].name() == "named"
    assert fr.report(fused).left == []
    assert pickle.loads(pickle.dumps(fused.layer1[0])).name() == "named"


def test_a_subclass_with_its_own_forward_is_traced() -> None:
    fused = assert_fused_means_the_same(small(PostAdd), image(2, 3, 33, 29))
    found = fr.report(fused)
    assert dict(found.fused)["layer1.0.conv2"] == "conv_bn_add_relu"
    assert found.left == []
    fused = assert_fused_means_the_same(small(kind=Doubled), image(2, 3, 33, 29))
    found = fr.report(fused)
    assert found.counts["conv_bn_relu_maxpool"] == 1
    assert found.left == []


def test_a_forward_replaced_on_the_instance_is_called() -> None:
    model = small(tv_resnet.BasicBlock, (2, 1, 1, 1))
    model.layer1[1].forward = lambda x: x * 2
    fused = fr.fuse(model)
    torch.testing.assert_close(fused(image(1, 3, 33, 29)), model(image(1, 3, 33, 29)))
    assert "layer1.1" in dict(fr.report(fused).left)
    later = fr.fuse(small())
    later.layer1[0].conv2.forward = lambda x: x * 0
    plain = small()
    plain.layer1[0].conv2.forward = lambda x: x * 0
    torch.testing.assert_close(later(image(1, 3, 33, 29)), plain(image(1, 3, 33, 29)))


# Children of others


def replace_relu(model: nn.Module) -> None:
    model.layer1[0].relu = nn.SiLU(inplace=True)
    model.relu = nn.LeakyReLU(0.2)


def replace_norm(model: nn.Module) -> None:
    model.layer1[0].bn2 = nn.GroupNorm(4, 8).double()
    model.layer2[0].bn3 = nn.SyncBatchNorm(64).double().eval()


def parametrize(model: nn.Module) -> None:
    torch.nn.utils.parametrizations.weight_norm(model.layer1[0].conv2)


def pad_with_reflections(model: nn.Module) -> None:
    model.layer1[0].conv2.padding_mode = "reflect"
    model.layer1[0].conv2._reversed_padding_repeated_twice = [1, 1, 1, 1]


def other_shortcut(model: nn.Module) -> None:
    conv, bn = model.layer2[0].downsample
    conv.stride = (1, 1)
    model.layer2[0].downsample = nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True), conv, bn)


def deeper_stem(model: nn.Module) -> None:
    model.conv1 = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 64, 3, 1, 1)
    ).double()


def no_max_pool(model: nn.Module) -> None:
    model.conv1.stride = (4, 4)
    model.maxpool = nn.Identity()


def ceil_max_pool(model: nn.Module) -> None:
    model.maxpool = nn.MaxPool2d(2, 2, ceil_mode=True)  # the map is 17 x 15


def stop_tracking(model: nn.Module) -> None:
    model.layer1[0].bn1.track_running_stats = False  # the statistics stay, and stay as they are


def shared(model: nn.Module) -> None:
    first, second = model.layer1
    second.conv2.weight = first.conv2.weight
    second.conv3 = first.conv3
    second.bn2 = second.bn1


CHANGES = {
    replace_relu: {"layer1.0.conv1", "conv1"},  # still fused, up to the batch norm
    replace_norm: set(),
    parametrize: {"layer1.0.bn2"},
    pad_with_reflections: {"layer1.0.bn2"},
    other_shortcut: {"layer2.0.downsample.1"},
    deeper_stem: {"conv1.0", "bn1"},
    no_max_pool: {"conv1"},
    ceil_max_pool: {"conv1"},
    stop_tracking: {"layer1.0.conv1"},
    shared: {f"layer1.{i}.conv{k}" for i in (0, 1) for k in (1, 2, 3)},
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changed_children_keep_their_meaning(change) -> None:
    model = small(layers=(2, 1, 1, 1))
    change(model)
    fused = fr.fuse(model)
    torch.testing.assert_close(fused(image(1, 3, 33, 29)), model(image(1, 3, 33, 29)))
    assert CHANGES[change] <= dict(fr.report(fused).fused).keys()
    if change is not replace_norm:  # SyncBatchNorm does not train on a CPU, in PyTorch either
        assert_fused_means_the_same(model, image(2, 3, 33, 29))


def test_children_changed_after_fusing_are_noticed() -> None:
    for change in CHANGES:
        model, fused = small(layers=(2, 1, 1, 1)), fr.fuse(small(layers=(2, 1, 1, 1)))
        for target in (model, fused):
            torch.manual_seed(3)
            change(target)
        x = image(1, 3, 33, 29)
        torch.testing.assert_close(fused(x), model(x), msg=change.__name__)


def test_report_gives_the_reason() -> None:
    model = small()
    replace_norm(model)
    parametrize(model)
    pad_with_reflections(small())
    model.layer4[0].conv1.register_forward_hook(lambda *_: None)
    model.layer4[0].bn2.register_forward_hook(lambda *_: None)
    assert fr.report(fr.fuse(model)).left == [
        ("layer1.0.conv2", "GroupNorm is not a plain BatchNorm2d"),
        ("layer2.0.conv3", "SyncBatchNorm is not a plain BatchNorm2d"),
        ("layer4.0.conv1", "a hook or a replaced forward on the Conv2d"),
        ("layer4.0.conv2", "a hook or a replaced forward on the BatchNorm2d"),
    ]


# Hooks


def every_hook(module: nn.Module, seen: list[str], name: str) -> None:
    module.register_forward_pre_hook(lambda m, a: seen.append(f"{name} pre"))
    module.register_forward_hook(lambda m, a, y: seen.append(f"{name} post {y.sum().item():.6f}"))


@pytest.mark.parametrize("child", ["conv1", "bn1", "conv2", "bn3", "relu", "downsample.1", ""])
def test_hooks_on_any_child_see_what_they_saw(child: str) -> None:
    model, fused = small(), fr.fuse(small())
    expected: list[str] = []
    seen: list[str] = []
    every_hook(model.layer2[0].get_submodule(child), expected, child)
    every_hook(fused.layer2[0].get_submodule(child), seen, child)
    x = image(2, 3, 33, 29)
    assert_same(results(fused, x), results(model, x))
    assert len(expected) >= 2
    assert seen == expected


def test_a_hook_can_change_the_output_and_be_removed() -> None:
    model, fused = small(), fr.fuse(small())
    x = image(1, 3, 33, 29)
    plain = fused(x)
    handles = [
        m.layer1[0].conv2.register_forward_hook(lambda m, a, y: y * 2) for m in (model, fused)
    ]
    torch.testing.assert_close(fused(x), model(x))
    assert not torch.allclose(fused(x), plain)
    for handle in handles:
        handle.remove()
    assert torch.equal(fused(x), plain)


def test_global_hooks_see_every_module() -> None:
    model, fused = small(), fr.fuse(small())
    names: list[str] = []
    handle = register_module_forward_hook(lambda m, a, y: names.append(type(m).__name__))
    try:
        model(image(1, 3, 33, 29))
        expected, names[:] = [n for n in names], []
        fused(image(1, 3, 33, 29))
    finally:
        handle.remove()
    assert sorted(n.removeprefix("Fused") for n in names) == sorted(expected)


def test_hooks_registered_before_are_shared_not_copied() -> None:
    seen: list[int] = []

    class Recorder:
        def hook(self, module: nn.Module, args: object, y: Tensor) -> None:
            seen.append(id(self))

    recorder, model = Recorder(), small()
    model.layer1.register_forward_hook(recorder.hook)
    fr.fuse(model)(image(1, 3, 33, 29))
    assert seen == [id(recorder)]


def test_a_hook_that_is_a_method_of_the_model_is_the_copys_own() -> None:
    class Recording(nn.Sequential):
        def record(self, module: nn.Module, args: object, y: Tensor) -> None:
            self.seen = y

    model = Recording(small())
    model[0].register_forward_hook(model.record)
    fused = fr.fuse(model)
    y = fused(image(1, 3, 33, 29))
    assert fused.seen is y
    assert not hasattr(model, "seen")


# Networks around a ResNet


def test_segmentation_network() -> None:
    backbone = IntermediateLayerGetter(
        small(replace_stride_with_dilation=[False, True, True]), {"layer3": "aux", "layer4": "out"}
    )
    model = FCN(backbone, FCNHead(256, 5).double(), FCNHead(128, 5).double())
    for head in (model.classifier, model.aux_classifier):
        head[3] = nn.Identity()  # dropout is random
    fused = assert_fused_means_the_same(randomize(model), image(2, 3, 33, 32))
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
def test_layer_getter_hands_out_every_intermediate(stop: str) -> None:
    getter = IntermediateLayerGetter(small(), {stop: "early", "layer1": "late"})
    fused = assert_fused_means_the_same(getter, image(2, 3, 24, 20))
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

    fused = assert_fused_means_the_same(Wrapped(), image(3, 4, 12, 12))
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


# What PyTorch does with models


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


def test_functional_call_uses_the_parameters_it_is_given() -> None:
    model = small()
    other = {k: v * 0.9 for k, v in model.state_dict().items() if v.is_floating_point()}
    x = image(1, 3, 33, 29)
    torch.testing.assert_close(
        torch.func.functional_call(fr.fuse(model), other, (x,)),
        torch.func.functional_call(model, other, (x,)),
    )


def test_every_available_backend_gives_the_same() -> None:
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


def test_wrong_arguments() -> None:
    for function in (fr.fuse, fr.report):
        with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got dict"):
            function({})
    with pytest.raises(ValueError, match=r"fuse: model: .* freeze\(\) made"):
        fr.fuse(fr.freeze(small(tv_resnet.BasicBlock, (1, 1, 1, 1))))


def test_a_model_that_cannot_be_copied_is_refused_in_one_line() -> None:
    model = small()
    model.lock = threading.Lock()
    with pytest.raises(TypeError, match=r"fuse: model: expected a module that .* '_thread.lock'"):
        fr.fuse(model)


def test_a_compiled_model_is_fused_inside() -> None:
    model, x = small(), image(1, 3, 33, 29)
    fused = fr.fuse(torch.compile(model, backend="eager"))
    torch.testing.assert_close(fused(x), model(x))
    assert len(fr.report(fused).fused) == 17


def test_report_prints() -> None:
    rich = pytest.importorskip("rich.console")
    found = fr.report(fr.fuse(small(PostAdd)))
    text = str(found)
    assert "layer1.0" in text
    assert "conv_bn_relu_maxpool" in text
    assert text.endswith(
        f"{len(found.fused)} groups fused (1 conv_bn_relu_maxpool, "
        f"12 conv_bn_add_relu), {len(found.left)} left"
    )
    out = io.StringIO()
    rich.Console(file=out, width=120).print(found)
    assert "conv_bn_relu_maxpool" in out.getvalue()
    assert "no groups" not in str(fr.report(nn.Linear(2, 2)))
