"""freeze: the numbers of the model in eval, in less work, and nothing that could train."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import weakref
from pathlib import Path

import pytest
import torch
import warm_process
from networks import image, randomize
from tolerances import assert_as_exact_as_pytorch
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.inference.frozen_conv import FrozenConv
from fused_resnet.nn.fused_forward import FusedForward


def network(shortcut: str = "B") -> fr.CifarResNet:
    """Small, with a stem, blocks and projections; the same at every call."""
    torch.manual_seed(0)
    return randomize(fr.cifar_resnet(20, shortcut=shortcut)).eval()


def unfused(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad(), fr.use_backend("reference"):
        return model(x)


def block(kind: str = "Bottleneck", dtype: torch.dtype = torch.float32, **kwargs) -> nn.Module:
    """One block behind a stem, so that every kind of group is there."""
    torch.manual_seed(0)
    cls = getattr(fr.nn, kind)
    width = 16 * cls.expansion
    shortcut = nn.Sequential(nn.Conv2d(16, width, 1, 2, bias=False), nn.BatchNorm2d(width))
    model = nn.Sequential(
        fr.nn.Stem(3, 16), cls(16, 16, 2, shortcut, **kwargs), cls(width, 16, **kwargs)
    )
    return randomize(model).to(dtype).eval()


def test_float64_is_exact() -> None:
    model, x = network().double(), image(2, 3, 32, 30)
    torch.testing.assert_close(fr.freeze(model)(x), unfused(model, x), rtol=1e-9, atol=1e-9)


def test_every_setting_of_convolution_and_batch_norm() -> None:
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 2, 2, bias=True),
        nn.BatchNorm2d(8, eps=1e-2),
        nn.ReLU(),
        nn.Conv2d(8, 12, (1, 3), (2, 1), (0, 1), groups=4),
        nn.BatchNorm2d(12, affine=False),
        nn.Conv2d(12, 10, 3, padding="same", dilation=2),
        nn.BatchNorm2d(10, momentum=None),
        nn.ReLU(),
        nn.Conv2d(10, 6, 3, padding="valid", bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(3, (2, 1), (1, 0)),
        nn.BatchNorm2d(6),
        nn.ReLU(),
    )
    model, x = randomize(layers).double().eval(), image(2, 3, 33, 29)
    frozen = fr.freeze(model)
    torch.testing.assert_close(frozen(x), unfused(model, x), rtol=1e-10, atol=1e-10)
    assert [type(m).__name__ for m in frozen].count("FrozenConv") == 4


@pytest.mark.parametrize("kind", ["BasicBlock", "Bottleneck"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_blocks_are_as_exact_as_pytorch(kind: str, dtype: torch.dtype) -> None:
    model, x = block(kind, dtype), image(2, 3, 61, 64, dtype=dtype)
    truth = unfused(copy.deepcopy(model).double(), x.double())
    assert_as_exact_as_pytorch(fr.freeze(model)(x), unfused(model, x), truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_exact_as_pytorchs(dtype: torch.dtype) -> None:
    model, x = block(), image(2, 3, 61, 64, dtype=torch.float32)
    truth = unfused(copy.deepcopy(model).double(), x.double())
    eager = unfused(copy.deepcopy(model).to(dtype), x.to(dtype))
    frozen = fr.freeze(model, dtype)
    assert frozen(x).dtype is torch.float32
    assert frozen(x.to(dtype)).dtype is dtype
    assert_as_exact_as_pytorch(frozen(x).to(dtype), eager, truth)


def test_every_group_is_frozen_and_the_report_says_so() -> None:
    frozen = fr.freeze(network())
    assert fr.report(frozen).fused == fr.report(network()).fused
    assert sum(isinstance(m, FrozenConv) for m in frozen.modules()) == 21
    assert not any(isinstance(m, nn.Conv2d | nn.BatchNorm2d) for m in frozen.modules())


def test_a_batch_norm_that_no_convolution_takes_up_is_reported_as_left() -> None:
    layers = (nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model, x = randomize(nn.Sequential(*layers)).eval(), image(2, 3, 9, 8, dtype=torch.float32)
    assert [path for path, _ in fr.report(fr.fuse(model)).fused] == ["0", "2"]
    frozen = fr.freeze(model)
    found = fr.report(frozen)
    assert found.fused == [("2", "conv_bn_add_relu")]
    assert found.left == [("0", "its batch norm can't be folded into a convolution")]
    torch.testing.assert_close(frozen(x), unfused(model, x))
    assert fr.report(pickle.loads(pickle.dumps(frozen))) == found


def test_frozen_modules_have_the_classes_that_they_had_before_fuse() -> None:
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    frozen = fr.freeze(models.resnet18(weights=None))
    assert not any(isinstance(m, FusedForward) for m in frozen.modules())
    assert all("Fused" not in cls.__name__ for m in frozen.modules() for cls in type(m).__mro__)


@pytest.mark.parametrize(
    ("own", "given", "accepted"),
    [
        (torch.float32, torch.float32, True),
        (torch.float32, torch.float64, False),
        (torch.float32, torch.bfloat16, False),
        (torch.bfloat16, torch.float32, True),
        (torch.bfloat16, torch.bfloat16, True),
        (torch.bfloat16, torch.float16, False),
        (torch.float64, torch.float32, True),
        (torch.float64, torch.float64, True),
    ],
)
def test_dtypes_in_and_out(own: torch.dtype, given: torch.dtype, accepted: bool) -> None:
    frozen = fr.freeze(network(), own)
    x = image(1, 3, 16, 16, dtype=given)
    if accepted:
        assert frozen(x).dtype is given
    else:
        with pytest.raises(TypeError, match=f"input: expected dtype .*{own}.*, got {given}"):
            frozen(x)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_any_layout_is_taken(layout: torch.memory_format) -> None:
    model = network()
    x = image(2, 3, 32, 64, dtype=torch.float32).contiguous(memory_format=layout)
    frozen = fr.freeze(model)
    torch.testing.assert_close(frozen(x), unfused(model, x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(frozen(x[:, :, :, ::2]), frozen(x[:, :, :, ::2].contiguous()))


def test_a_dict_of_outputs_is_converted_too() -> None:
    models = pytest.importorskip("torchvision.models", reason="torchvision's segmentation model")
    torch.manual_seed(0)
    model = models.segmentation.fcn_resnet50(
        weights=None, weights_backbone=None, num_classes=3, aux_loss=True
    )
    randomize(model).eval()
    x = image(1, 3, 33, 32, dtype=torch.float32)
    y = fr.freeze(model, torch.bfloat16)(x)
    assert list(y) == ["out", "aux"]
    truth = unfused(model, x)
    for name, value in y.items():
        assert value.dtype is torch.float32
        assert (value - truth[name]).norm() < 0.1 * truth[name].norm()
    exact = fr.freeze(model)(x)
    torch.testing.assert_close(exact["out"], truth["out"], rtol=1e-4, atol=1e-4)


def test_it_refuses_to_train() -> None:
    frozen = fr.freeze(network())
    for name, module in frozen.named_modules():
        with pytest.raises(RuntimeError, match=r"train\(\): this model is frozen for inference"):
            module.train()
        assert module.eval() is module, name
    assert not any(m.training for m in frozen.modules())
    assert not any(p.requires_grad for p in frozen.parameters())
    with pytest.raises(RuntimeError, match=r"requires_grad_\(\): this model is frozen"):
        frozen.requires_grad_()
    x = image(1, 3, 16, 16, dtype=torch.float32).requires_grad_()
    assert not frozen(x).requires_grad


def test_it_refuses_conversions_and_stays_intact() -> None:
    frozen, x = fr.freeze(network()), image(1, 3, 16, 16, dtype=torch.float32)
    before = frozen(x)
    for convert in (lambda m: m.half(), lambda m: m.double(), lambda m: m.to("meta")):
        for module in (frozen, frozen.layer1, frozen.conv1, frozen.linear):
            with pytest.raises(RuntimeError, match=r"conversion to .* frozen for inference"):
                convert(module)
    frozen.float().cpu().to(memory_format=torch.channels_last)
    assert torch.equal(frozen(x), before)


def test_it_shares_nothing_with_the_model() -> None:
    model, x = network(), image(1, 3, 16, 16, dtype=torch.float32)
    frozen = fr.freeze(model)
    before = frozen(x)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    assert torch.equal(frozen(x), before)
    assert not model.training
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_in_training_is_frozen_in_eval_and_goes_on_training() -> None:
    model = network().train()
    model.linear = nn.Sequential(nn.Dropout(0.5), model.linear, nn.BatchNorm1d(10))
    frozen, x = fr.freeze(model), image(2, 3, 16, 16, dtype=torch.float32)
    assert model.training
    assert model.linear[0].training
    torch.testing.assert_close(frozen(x), unfused(model.eval(), x), rtol=1e-4, atol=1e-4)


def test_the_model_can_be_let_go() -> None:
    model, x = network(), image(1, 3, 16, 16, dtype=torch.float32)
    frozen = fr.freeze(model)
    frozen(x)
    weights = [weakref.ref(p) for p in model.parameters()]
    del model
    gc.collect()
    assert not any(reference() is not None for reference in weights)


def test_weights_are_stored_once() -> None:
    model, frozen = network(), fr.freeze(network())
    layouts = [m.packed for m in frozen.modules() if isinstance(m, FrozenConv)]
    held = [*frozen.parameters(), *frozen.buffers(), *layouts]
    values = sum(t.numel() for t in {t.data_ptr(): t for t in held}.values())
    own = sum(p.numel() for p in model.parameters())
    # Packing pads the last panel of channels, and channels are few here: twice would be twice.
    assert values < 1.5 * own


def winograds(frozen: nn.Module) -> list[nn.Module]:
    return [m for m in frozen.modules() if getattr(m, "winograd", False)]


def test_winograd_is_not_for_float64_and_can_be_switched_off() -> None:
    model = randomize(fr.resnet18(num_classes=10)).eval()
    assert winograds(fr.freeze(model))
    assert not winograds(fr.freeze(model, winograd=False))
    assert winograds(fr.freeze(model, torch.bfloat16))
    assert not winograds(fr.freeze(model, torch.float64))
    x = image(2, 3, 96, 96, dtype=torch.float32)
    truth = model.double()(x.double())
    model.float()
    errors = [
        ((fr.freeze(model, winograd=w)(x).double() - truth).norm() / truth.norm()).item()
        for w in (False, True)
    ]
    assert errors[0] < 1e-6
    assert errors[0] != errors[1] < 5e-6


def test_loaded_weights_are_packed() -> None:
    one, other = (fr.freeze(randomize(fr.resnet18(num_classes=10), seed)) for seed in (1, 2))
    x = image(1, 3, 96, 96, dtype=torch.float32)
    assert not torch.equal(one(x), other(x))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x), other(x))


def test_names_that_others_read_stay() -> None:
    model = network()
    conv, frozen = model.layer2[0].conv1, fr.freeze(network()).layer2[0].conv1
    assert torch.equal(frozen.weight, conv.weight)
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"):
        assert getattr(frozen, name) == getattr(conv, name)
    assert frozen.groups == conv.groups
    assert isinstance(fr.freeze(model), fr.CifarResNet)


def leave_hook(model: nn.Module) -> None:
    model[1].bn2.register_forward_hook(lambda m, a, y: y * 2)


def leave_batch_statistics(model: nn.Module) -> None:
    model[1].bn1 = nn.BatchNorm2d(16, track_running_stats=False)


def leave_group_norm(model: nn.Module) -> None:
    model[2].bn1 = nn.GroupNorm(4, 16)


def leave_padding_mode(model: nn.Module) -> None:
    model[1].conv2 = nn.Conv2d(16, 16, 3, 2, 1, padding_mode="circular", bias=False)


def leave_activation(model: nn.Module) -> None:
    model[1].relu = nn.SiLU(inplace=True)


def leave_parametrization(model: nn.Module) -> None:
    torch.nn.utils.parametrizations.weight_norm(model[2].conv1)


@pytest.mark.parametrize(
    "change",
    [
        leave_hook,
        leave_batch_statistics,
        leave_group_norm,
        leave_padding_mode,
        leave_activation,
        leave_parametrization,
    ],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_what_cannot_be_frozen_runs_as_it_was(change, dtype: torch.dtype | None) -> None:
    model = block(dtype=torch.float32 if dtype else torch.float64)
    torch.manual_seed(1)
    change(model)
    model.to(torch.float32 if dtype else torch.float64).eval()
    x = image(2, 3, 61, 64, dtype=torch.float32 if dtype else torch.float64)
    expected, frozen = unfused(model, x), fr.freeze(model, dtype)
    limit = 5e-2 if dtype else 1e-9
    assert (frozen(x) - expected).norm() <= limit * expected.norm()
    groups = sum(isinstance(m, FrozenConv) for m in frozen.modules())
    assert groups == (8 if change is leave_activation else 7)
    with pytest.raises(RuntimeError, match="frozen"):
        frozen[2].bn1.train()


def test_a_network_of_torchvision_with_shared_modules() -> None:
    models = pytest.importorskip("torchvision.models", reason="torchvision's ResNet")
    torch.manual_seed(0)
    model = randomize(models.resnet18(num_classes=5)).double().eval()
    model.layer1[1].conv1 = model.layer1[0].conv1
    model.layer1[1].bn2 = model.layer1[0].bn2
    x = image(2, 3, 33, 33)
    with torch.no_grad():
        torch.testing.assert_close(fr.freeze(model)(x), model(x), rtol=1e-9, atol=1e-9)
    assert isinstance(fr.freeze(model), models.ResNet)
    assert [type(m) for m in model.modules()].count(nn.Conv2d) == 19


def test_backends() -> None:
    model = network()
    frozen, x = fr.freeze(model), image(1, 3, 32, 32, dtype=torch.float32)
    calls: list[str] = []
    original = torch.nn.functional.conv2d

    def counted(*args, **kwargs):
        calls.append("conv2d")
        return original(*args, **kwargs)

    torch.nn.functional.conv2d = counted
    try:
        with fr.use_backend("cpu"):
            ours = frozen(x)
        assert calls == []
        with fr.use_backend("reference"):
            reference = frozen(x)
        assert len(calls) == 21
    finally:
        torch.nn.functional.conv2d = original
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


def test_inference_mode_and_threads_and_repeats_give_the_same_bits() -> None:
    frozen, x = fr.freeze(network()), image(2, 3, 32, 32, dtype=torch.float32)
    first = frozen(x)
    with torch.inference_mode():
        assert torch.equal(frozen(x), first)
        assert torch.equal(fr.freeze(network())(x), first)
    assert torch.equal(frozen(x), first)


def test_compile_and_autocast() -> None:
    frozen, x = fr.freeze(block()), image(2, 3, 61, 64, dtype=torch.float32)
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), frozen(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert frozen(x).dtype is torch.float32


# Copies and files


def test_copies_and_pickles() -> None:
    frozen, x = fr.freeze(network(), torch.bfloat16), image(1, 3, 16, 16, dtype=torch.float32)
    buffer = io.BytesIO()
    torch.save(frozen, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (loaded, copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert torch.equal(other(x), frozen(x))
        assert [type(m) for m in other.modules()] == [type(m) for m in frozen.modules()]
        with pytest.raises(RuntimeError, match="frozen"):
            other.train()


def test_state_dicts_hold_weights_in_pytorchs_layout() -> None:
    model, x = network(), image(1, 3, 16, 16, dtype=torch.float32)
    state = fr.freeze(model).state_dict()
    assert torch.equal(state["layer1.0.conv1.weight"], model.layer1[0].conv1.weight)
    assert not any("packed" in key for key in state)
    other = randomize(fr.cifar_resnet(20, shortcut="B"), seed=8)
    frozen = fr.freeze(other)
    frozen.load_state_dict(state)
    assert torch.equal(frozen(x), fr.freeze(model)(x))
    del state["conv1.scale"]
    state["conv1.packed"] = torch.zeros(1)
    state["conv1.shift"] = torch.zeros(3)
    with pytest.raises(RuntimeError, match=r"(?s)conv1\.scale.*conv1\.packed.*conv1\.shift"):
        frozen.load_state_dict(state)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "isa", ["portable", "avx2", "avx512", "avx512_bf16", "amx", "amx_emulated"]
)
def test_a_saved_model_loads_on_another_instruction_set(
    tmp_path: Path, isa: str, dtype: torch.dtype
) -> None:
    if isa not in fr.build_info()["isa_supported"]:
        pytest.skip(f"this machine or build has no {isa} kernels")
    frozen, x = fr.freeze(network(), dtype), image(1, 3, 16, 16, dtype=torch.float32)
    limit = 1e-4 if dtype is torch.float32 else 3e-2
    torch.save(frozen, tmp_path / "frozen.pt")
    torch.save({"x": x, "y": frozen(x)}, tmp_path / "expected.pt")
    script = (
        "import sys, torch, fused_resnet as fr\n"
        f"assert fr.build_info()['isa'] == {isa!r}\n"
        f"frozen = torch.load({str(tmp_path / 'frozen.pt')!r}, weights_only=False)\n"
        f"expected = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        "y = frozen(expected['x'])\n"
        f"assert (y - expected['y']).norm() < {limit} * expected['y'].norm()\n"
        f"torch.save(frozen, {str(tmp_path / 'back.pt')!r})\n"
    )
    environment = os.environ | {"FUSED_RESNET_ISA": isa}
    warm_process.run(["-c", script], check=True, env=environment)
    back = torch.load(tmp_path / "back.pt", weights_only=False)
    assert torch.equal(back(x), frozen(x))


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got int"):
        fr.freeze(3)
    with pytest.raises(TypeError, match=r"freeze: dtype: expected one of .* got torch\.int8"):
        fr.freeze(network(), torch.int8)
    with pytest.raises(ValueError, match=r"^freeze: model: .* got one that freeze\(\) made"):
        fr.freeze(fr.freeze(network()))
    with torch.device("meta"):
        model = fr.cifar_resnet(20)
    with pytest.raises(fr.BackendUnavailable, match=r"conv1.weight is on meta; move the model to"):
        fr.freeze(model)
    with pytest.raises((ValueError, TypeError), match="channels"):
        fr.freeze(network())(torch.zeros(1, 4, 8, 8))
    assert fr.freeze(network())(torch.zeros(0, 3, 8, 8)).shape == (0, 10)
