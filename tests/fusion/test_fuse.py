"""``fuse`` and ``report``: shared parameters, torchvision's family, wrong arguments."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import threading

import pytest
import torch
from networks import image, randomize
from torch import nn

import fused_resnet as fr

tv = pytest.importorskip("torchvision", reason="torchvision's networks are what is fused here")
from torchvision.models import resnet as tv_resnet  # noqa: E402
from torchvision.ops.misc import FrozenBatchNorm2d  # noqa: E402
from torchvision_networks import PostAdd, assert_fused_equals_eager, small  # noqa: E402

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
    fused = assert_fused_equals_eager(small(**FAMILY[name]), image(2, 3, 33, 29))
    found = fr.report(fused)
    norms = [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d | FrozenBatchNorm2d)]
    assert len(found.fused) == len(norms)
    assert found.left == []
    assert found.counts["conv_bn_relu_maxpool"] == 1


def test_fusing_shares_parameters_and_does_not_change_the_original() -> None:
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


def test_nothing_is_cached_between_calls() -> None:
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


def test_state_dicts_load_in_both_directions() -> None:
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


def test_wrong_arguments() -> None:
    for function in (fr.fuse, fr.report):
        with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got dict"):
            function({})
    with pytest.raises(ValueError, match=r"fuse: model: .* freeze\(\) made"):
        fr.fuse(fr.freeze(small(tv_resnet.BasicBlock, (1, 1, 1, 1))))


def test_a_model_that_cannot_be_copied_is_an_error_of_one_line() -> None:
    model = small()
    model.lock = threading.Lock()
    with pytest.raises(TypeError, match=r"fuse: model: expected a module that .* '_thread.lock'"):
        fr.fuse(model)


def test_the_module_inside_a_compiled_model_is_fused() -> None:
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
