"""Traced modules under autocast, torch.compile, export, copies, checkpoints and optimizers."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from networks import assert_same, image, randomize, results
from torch import Tensor, nn
from traced_modules import (
    Between,
    DropPath,
    Residual,
    Stem,
    TwoSides,
    ready,
)

import fused_resnet as fr
from fused_resnet.inference.freeze import FrozenConv


def network() -> nn.Module:
    """Every kind of group, in classes of no library."""
    return ready(nn.Sequential(Stem(), Residual(), Between(DropPath(0.0)), TwoSides()))


def test_autocast() -> None:
    model, x = network().float(), image(2, 4, 17, 15, dtype=torch.float32)
    fused = fr.fuse(model)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = fused(x), model(x)
    assert y.dtype is expected.dtype
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)


def test_channels_last() -> None:
    fused = fr.fuse(network()).to(memory_format=torch.channels_last)
    x = image(2, 4, 17, 15).to(memory_format=torch.channels_last)
    assert fused(x).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(fused(x), network()(x))


@pytest.mark.parametrize("training", [True, False])
def test_compile_in_one_graph(training: bool) -> None:
    torch._dynamo.reset()
    model, x = network().train(training), image(2, 4, 17, 15)
    fused = fr.fuse(copy.deepcopy(model))
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert_same(
        {k.replace("_orig_mod.", ""): v for k, v in results(compiled, x).items()},
        results(model, x),
    )


@pytest.mark.parametrize("prepare", [fr.fuse, fr.freeze])
def test_export(prepare) -> None:
    model, x = network(), image(2, 4, 17, 15)
    program = torch.export.export(prepare(model), (x,))
    torch.testing.assert_close(program.module()(x), model(x))
    assert "torch.ops.fused_resnet" in str(program)


def test_export_keeps_the_names_of_arguments() -> None:
    batch = torch.export.Dim("batch", min=1, max=8)
    fused, x = fr.fuse(ready(Residual())), image(2, 4, 9, 7)
    program = torch.export.export(fused, (x,), dynamic_shapes={"x": {0: batch}})
    torch.testing.assert_close(program.module()(image(5, 4, 9, 7)), fused(image(5, 4, 9, 7)))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("prepare", [fr.fuse, fr.freeze])
def test_jit_trace(prepare) -> None:
    model, x = network(), image(2, 4, 17, 15)
    with torch.no_grad():
        traced = torch.jit.trace(prepare(model), x)
        torch.testing.assert_close(traced(x), model(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_jit_trace_with_gradients_passes_its_own_check() -> None:
    """The check traces again without gradients."""
    biased = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    x = image(1, 3, 32, 32, dtype=torch.float32)
    for model in (fr.resnet18(num_classes=3).eval(), fr.fuse(biased.eval())):
        torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))


def test_fx_trace_sees_the_original_modules() -> None:
    model, x = network(), image(2, 4, 17, 15)
    graph = torch.fx.symbolic_trace(fr.fuse(model))
    torch.testing.assert_close(graph(x), model(x))
    assert {"0.conv", "1.bn"} <= {str(n.target) for n in graph.graph.nodes}


@pytest.mark.parametrize("prepare", [fr.fuse, fr.freeze])
def test_copies_pickles_and_files(prepare) -> None:
    model, x = prepare(network()), image(2, 4, 17, 15)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(other(x), model(x))
        assert fr.report(other) == fr.report(model)
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]


def test_a_moving_average_of_a_fused_model() -> None:
    fused, x = fr.fuse(network()), image(2, 4, 17, 15)
    average = torch.optim.swa_utils.AveragedModel(
        fused, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    average.update_parameters(fused)
    torch.testing.assert_close(average.eval()(x), fused(x))
    assert fr.report(average.module) == fr.report(fused)


def test_checkpoints_load_in_both_directions() -> None:
    old, fused = network(), fr.fuse(network())
    randomize(old, seed=9)
    x = image(2, 4, 17, 15)
    assert not torch.allclose(fused(x), old(x))
    fused.load_state_dict(old.state_dict())
    torch.testing.assert_close(fused(x), old(x))
    fresh = fr.fuse(network())
    old.load_state_dict(fresh.state_dict())
    torch.testing.assert_close(fresh(x), old(x))


def test_an_optimizer_built_before_fusing_still_trains() -> None:
    model = network().train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    fused, x = fr.fuse(model), image(2, 4, 17, 15)
    before = model[1].conv.weight.detach().clone()
    fused(x).sum().backward()
    optimizer.step()
    assert not torch.equal(model[1].conv.weight, before)
    assert model[1].conv.weight is fused[1].conv.weight


def test_hooks_inside_a_frozen_model_are_refused() -> None:
    model, x = ready(Between(nn.Identity())), image(2, 4, 9, 7)
    frozen = fr.freeze(model)
    assert isinstance(frozen.conv, FrozenConv)
    with pytest.raises(RuntimeError, match="register the hook on the frozen model itself"):
        frozen.middle.register_forward_hook(lambda m, a, y: None)
    seen: list[Tensor] = []
    frozen.register_forward_hook(lambda m, a, y: seen.append(y))
    torch.testing.assert_close(frozen(x), model(x))
    torch.testing.assert_close(seen, [model(x)])
