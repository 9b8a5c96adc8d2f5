"""Traced modules of libraries: what they have between, inside and around a group's modules."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from networks import assert_same, image, randomize, results
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from traced_modules import Between, Residual, Unit, check, fused_as, ready, unfused_in

import fused_resnet as fr
from fused_resnet.inference.frozen_conv import FrozenConv

# Random numbers: the same ones from the same state of the generator


def check_draws(model: nn.Module, *inputs: Tensor, steps: int = 2) -> nn.Module:
    """Eager and fused agree in training steps that begin from the same random state, and in eval.

    The generator stands where it stood for eager: nothing more and nothing less was drawn.
    """
    eager, fused = copy.deepcopy(model).train(), fr.fuse(copy.deepcopy(model)).train()
    outputs = []
    for step in range(steps):
        after = []
        for network in (eager, fused):
            torch.manual_seed(step)
            found = results(network, *inputs)
            after.append((found, torch.get_rng_state()))
        assert torch.equal(after[0][1], after[1][1])
        assert_same(after[1][0], after[0][0])
        outputs.append(next(iter(after[0][0].values())))
    # Random numbers were drawn: another state gives another result.
    assert not torch.equal(outputs[0], outputs[1])
    with torch.no_grad():
        expected = eager.eval()(*inputs)
        torch.testing.assert_close(fused.eval()(*inputs), expected, rtol=1e-9, atol=1e-9)
        frozen = fr.freeze(copy.deepcopy(eager))
        torch.testing.assert_close(frozen(*inputs), expected, rtol=1e-9, atol=1e-9)
    return fused


def drop_path() -> nn.Module:
    return pytest.importorskip("timm.layers", reason="timm's drop-path").DropPath(0.5)


def drop_block() -> nn.Module:
    layers = pytest.importorskip("timm.layers", reason="timm's drop-block")
    return layers.DropBlock2d(0.4, block_size=3)


@pytest.mark.parametrize("make", [drop_path, drop_block, lambda: nn.Dropout2d(0.5)])
def test_modules_inside_a_group_in_training(make) -> None:
    torch.manual_seed(0)
    model = ready(Between(make()))
    fused = check_draws(model, image(4, 4, 9, 7))
    assert set(fused_as(fused).values()) <= {"conv_bn_add_relu"}


@pytest.mark.parametrize(
    "rates", [{"drop_path_rate": 0.5}, {"drop_block_rate": 0.5}, {"aa_layer": "blur"}], ids=str
)
def test_timms_networks_with_dropout_and_blur(rates) -> None:
    timm = pytest.importorskip("timm", reason="timm's ResNet")
    torch.manual_seed(0)
    options = {"layers": (1, 2, 1, 1), "block": timm.models.resnet.BasicBlock, "num_classes": 3}
    if "aa_layer" in rates:
        options["aa_layer"] = timm.layers.BlurPool2d
        rates = {}
    model = randomize(timm.models.ResNet(**options, **rates)).double().eval()
    x = image(4, 3, 64, 64)
    fused = check_draws(model, x) if rates else check(model, x)
    assert sum(op == "conv_bn_add_relu" for op in fused_as(fused).values()) >= 8


# Batch norms of libraries


def timm_norm(name: str, **kwargs) -> nn.Module:
    layers = pytest.importorskip("timm.layers", reason="timm's batch norms")
    return getattr(layers, name)(4, **kwargs)


class Normed(nn.Module):
    """Convolution and a normalisation, added to the input."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1, bias=False), norm

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + x


@pytest.mark.parametrize(
    ("name", "kwargs", "group"),
    [
        ("BatchNormAct2d", {}, True),
        ("BatchNormAct2d", {"apply_act": False}, True),
        ("BatchNormAct2d", {"act_layer": nn.SiLU}, True),
        ("FrozenBatchNormAct2d", {}, True),
        ("GroupNormAct", {"num_groups": 2}, False),
    ],
    ids=str,
)
def test_timms_norms_with_an_activation_inside(name: str, kwargs, group: bool) -> None:
    model = ready(Normed(timm_norm(name, **kwargs)))
    fused = check(model)
    assert bool(fused_as(fused)) is group
    assert isinstance(fr.freeze(model).conv, FrozenConv) is group


def test_subclasses_of_timms_norms_are_not_fused() -> None:
    """One with an operation before the activation, and timm's own synchronised one."""
    base = type(timm_norm("BatchNormAct2d"))

    class Doubled(base):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x)

    fused = check(ready(Normed(Doubled(4))))
    assert fused_as(fused) == {}
    assert unfused_in(fused) == {"bn": "Doubled is not a plain BatchNorm2d"}
    layers = pytest.importorskip("timm.layers", reason="timm's batch norms")
    model = layers.convert_sync_batchnorm(ready(Normed(timm_norm("BatchNormAct2d"))))
    assert type(model.bn).__name__ == "SyncBatchNormAct"
    assert unfused_in(fr.fuse(model)) == {"bn": "SyncBatchNormAct is not a plain BatchNorm2d"}


def frozen_norm(home: str) -> type[nn.Module]:
    """torchvision's, with an ``eps``, and the one of transformers' DETR, without."""
    if home == "torchvision":
        library = pytest.importorskip("torchvision.ops.misc", reason="its frozen batch norm")
        return library.FrozenBatchNorm2d
    library = pytest.importorskip("transformers.models.detr.modeling_detr", reason="DETR")
    return library.DetrFrozenBatchNorm2d


@pytest.mark.parametrize("home", ["torchvision", "transformers"])
def test_frozen_batch_norms(home: str) -> None:
    norm = frozen_norm(home)
    assert hasattr(norm(4), "eps") is (home == "torchvision")
    model = Residual()
    model.bn = norm(4)
    fused = check(ready(model))
    assert fused_as(fused) == {"conv": "conv_bn_add_relu"}
    # In training too it uses the running statistics, which do not change.
    before = fused.bn.running_mean.clone()
    fused.train()(image(2, 4, 9, 7))
    assert torch.equal(fused.bn.running_mean, before)


def test_the_detr_backbone_with_torchvisions_resnet() -> None:
    """torchvision's ResNet with frozen batch norms, of which DETR uses the last map."""
    models = pytest.importorskip("torchvision.models", reason="torchvision's ResNet")
    utils = pytest.importorskip("torchvision.models._utils", reason="its IntermediateLayerGetter")
    torch.manual_seed(0)
    resnet = models.resnet18(norm_layer=frozen_norm("torchvision"))
    model = utils.IntermediateLayerGetter(resnet, {"layer4": "0"})
    fused = check(randomize(model).double().eval(), image(1, 3, 40, 33))
    assert list(fused_as(fused).values()).count("conv_bn_relu_maxpool") <= 1
    assert len(fused_as(fused)) >= 19


def test_the_detr_backbone_of_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers' DETR")
    modeling = pytest.importorskip("transformers.models.detr.modeling_detr", reason="DETR")
    torch.manual_seed(0)
    inner = transformers.ResNetConfig(
        layer_type="basic", depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], embedding_size=8,
        out_features=["stage4"],
    )  # fmt: skip
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        backbone_config=inner,
    )  # fmt: skip
    model = randomize(modeling.DetrConvEncoder(config)).double().eval()
    norms = [m for m in model.modules() if isinstance(m, modeling.DetrFrozenBatchNorm2d)]
    assert norms
    assert not hasattr(norms[0], "eps")
    x, mask = image(2, 3, 40, 33), torch.ones(2, 40, 33, dtype=torch.bool)
    with torch.no_grad():
        expected = model(x, mask)
        for made in (fr.fuse(model), fr.freeze(model)):
            assert len(fr.report(made).fused) == len(norms)
            for got, truth in zip(made(x, mask), expected, strict=True):
                torch.testing.assert_close(got, truth, rtol=1e-9, atol=1e-9)


# Parametrisations


def weight_norm(conv: nn.Conv2d) -> None:
    parametrizations.weight_norm(conv)


def spectral_norm(conv: nn.Conv2d) -> None:
    torch.manual_seed(0)  # the first vector of its power iteration
    parametrizations.spectral_norm(conv)


def orthogonal(conv: nn.Conv2d) -> None:
    parametrizations.orthogonal(conv)


def old_weight_norm(conv: nn.Conv2d) -> None:
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(conv)


def old_spectral_norm(conv: nn.Conv2d) -> None:
    torch.manual_seed(0)
    torch.nn.utils.spectral_norm(conv)


def pruned(conv: nn.Conv2d) -> None:
    prune.l1_unstructured(conv, "weight", 0.5)


@pytest.mark.parametrize(
    "parametrise",
    [weight_norm, spectral_norm, orthogonal, old_weight_norm, old_spectral_norm, pruned],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("where", ["before", "after"])
def test_parametrised_convolutions(parametrise, where: str) -> None:
    """What computes the weight at each call goes on doing so, put there before the swap or after.

    Outputs, gradients of the parameters behind the weight, and a power iteration's vectors.
    """
    x = image(2, 4, 9, 7)
    eager, other = ready(Residual()), ready(Residual())
    parametrise(eager.conv)
    if where == "before":
        parametrise(other.conv)
        fused = fr.fuse(other)
    else:
        fused = fr.fuse(other)
        parametrise(fused.conv)
    for training in (False, True, True):
        assert_same(results(fused.train(training), x), results(eager.train(training), x))
    if where == "before":
        with torch.no_grad():
            torch.testing.assert_close(fr.freeze(other)(x), eager.eval()(x), rtol=1e-9, atol=1e-9)


def test_a_parametrised_batch_norm() -> None:
    class Positive(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight.exp()

    model = ready(Residual())
    torch.nn.utils.parametrize.register_parametrization(model.bn, "weight", Positive())
    check(model)


# TorchScript


def scriptable() -> nn.Module:
    return ready(nn.Sequential(Unit(), Residual()))


def test_scripted_modules_inside_a_model_are_not_fused() -> None:
    """A ``ScriptModule`` inside a fused or frozen model runs unchanged."""
    inner = torch.jit.script(scriptable())
    model = nn.Sequential(ready(Unit()), inner).eval()
    x = image(2, 4, 9, 7)
    with torch.no_grad():
        expected = model(x)
        for made in (fr.fuse(model), fr.freeze(model)):
            torch.testing.assert_close(made(x), expected, rtol=1e-9, atol=1e-9)
    assert set(fused_as(fr.fuse(model))) == {"0.conv"}


@pytest.mark.parametrize("prepare", [fr.fuse, fr.freeze])
def test_torch_jit_script_is_an_error_of_one_line(prepare) -> None:
    """Its compiler reads source, and a swapped forward has none that it could compile.

    The model that was swapped is scripted as ever.
    """
    for model in (prepare(scriptable()), nn.Sequential(prepare(ready(Unit())))):
        with pytest.raises(RuntimeError, match=r"only Python runs; use torch\.export or"):
            torch.jit.script(model)


@pytest.mark.parametrize("prepare", [fr.fuse, fr.freeze])
def test_torch_jit_trace_freeze_and_files(prepare) -> None:
    """A trace is valid for its shape and mode, and can be saved and frozen by ``torch.jit``."""
    model, x, other = scriptable(), image(2, 4, 9, 7), image(3, 4, 9, 7, seed=8)
    with torch.no_grad():
        traced = torch.jit.trace(prepare(model), x)
        buffer = io.BytesIO()
        torch.jit.save(traced, buffer)
        buffer.seek(0)
        for made in (traced, torch.jit.load(buffer), torch.jit.freeze(traced.eval())):
            torch.testing.assert_close(made(x), model(x), rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(made(other), model(other), rtol=1e-9, atol=1e-9)
