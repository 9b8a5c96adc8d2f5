"""Under ``auto`` on CUDA the convolutions of a training unit are chosen, each direction apart."""

from __future__ import annotations

import emulation
import pytest
import torch
from networks import image
from torch import Tensor

import fused_resnet as fr
from fused_resnet.backends import availability
from fused_resnet.ops import training_tuned
from fused_resnet.ops.registry import OPERATORS
from fused_resnet.ops.training_reference import run_reference
from fused_resnet.ops.training_spec import Layer, LayerTensors, Unit
from fused_resnet.ops.training_unit import training_unit
from fused_resnet.tuning import tuner

ONE = (1, 1)
LAYER = Layer(ONE, ONE, ONE, 1, 2.0**-10, 0.25, True)


def tensors(seed: int) -> LayerTensors:
    w = (image(16, 16, 3, 3, seed=seed) / 12).float().requires_grad_()
    bn = [image(16, seed=seed + i).float().abs().requires_grad_() for i in (1, 2)]
    return LayerTensors(w, *bn, torch.zeros(16), torch.ones(16), torch.tensor(3))


def launched() -> list[str]:
    """The kernels since the last question."""
    return [launch.kernel for launch in emulation._interpreter().launches()]


@pytest.fixture(autouse=True)
def _fresh():
    """Nothing that is cached is of another test's operators."""
    caches = (training_tuned._tuned, training_tuned._candidates, training_tuned._triton_runs)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("forward", ["triton", "library", "cuda"])
@pytest.mark.parametrize("backward", ["triton", "library", "cuda"])
def test_forward_and_backward_are_chosen_apart(monkeypatch, forward, backward):
    """CUDA's primitives are Triton's of the same schema here; the simulator's tests have them."""
    chosen: list[str] = []
    ran: list[str] = []
    monkeypatch.setitem(OPERATORS, "cuda", torch.ops.fused_resnet_triton)

    def choose(op, default, candidates, arguments):
        assert default == "library"
        assert set(candidates) == {"triton", "library", "cuda"}
        ran.extend(launched())  # by the layers before
        # What is timed runs many times: it must have the arguments and write to none.
        before = [a.clone() for a in arguments if isinstance(a, Tensor)]
        for operators in candidates.values():
            getattr(operators, op)(*arguments)
        after = [a for a in arguments if isinstance(a, Tensor)]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        launched()
        chosen.append(op)
        return {"conv_forward": forward, "conv_backward": backward}[op]

    monkeypatch.setattr(tuner, "choose", choose)
    held = [tensors(1), tensors(4)]
    x = image(2, 16, 6, 5).float().requires_grad_()
    unit = Unit((LAYER, LAYER), "identity", backend=training_tuned.TUNED)
    with torch.backends.cudnn.flags(allow_tf32=False), emulation.operators("triton"):
        y = training_unit(unit, x, None, held)
        ran.extend(launched())
        assert ("conv_bn_add_relu_kernel" in ran) == (forward != "library")
        y.square().sum().backward()
        ran.extend(launched())
        assert ("conv_data_gradient_kernel" in ran) == (backward != "library")
    assert chosen == ["conv_forward"] * 2 + ["conv_backward"] * 2
    found = {"y": y.detach(), "x": x.grad} | results_of(held)

    truths = [
        LayerTensors(*(t.detach().double().requires_grad_() for t in layer[:3]),
                     torch.zeros(16).double(), torch.ones(16).double(), torch.tensor(3))
        for layer in held
    ]  # fmt: skip
    x64 = image(2, 16, 6, 5).float().double().requires_grad_()
    y64 = run_reference(unit, x64, None, truths)
    y64.square().sum().backward()
    for name, truth in ({"y": y64.detach(), "x": x64.grad} | results_of(truths)).items():
        torch.testing.assert_close(
            found[name].double(), truth.double(), rtol=1e-4, atol=1e-4, msg=lambda m, n=name: n + m
        )


def results_of(held: list[LayerTensors]) -> dict[str, Tensor]:
    found = {}
    for i, layer in enumerate(held):
        for name, t in layer._asdict().items():
            found[f"{i} {name}"] = t if t.grad is None else t.grad
    return found


def test_where_it_is_chosen(monkeypatch):
    """On CUDA under auto, where calls may be timed; else operations run one by one, as before."""
    x = torch.zeros(1, 1, 1, 1)
    assert training_tuned.unit_backend(x) == "cpu"
    with fr.use_backend("library"):
        assert training_tuned.unit_backend(x) == "library"
    monkeypatch.setattr(training_tuned, "resolve_backend", lambda op, x: "cuda")
    monkeypatch.setenv("FUSED_RESNET_TUNE", "1")
    with emulation.operators("triton"):
        assert training_tuned.unit_backend(x) == training_tuned.TUNED
        with availability._forced("cuda"):
            assert training_tuned.unit_backend(x) == "cuda"
        monkeypatch.setenv("FUSED_RESNET_TUNE", "0")
        assert training_tuned.unit_backend(x) == ""


def test_triton_that_fails_is_left_out(monkeypatch):
    """Here its operators have no kernels for a CPU; on a card there may be no C compiler."""
    monkeypatch.setattr(training_tuned, "resolve_backend", lambda op, x: "cuda")
    monkeypatch.setenv("FUSED_RESNET_TUNE", "1")
    x = torch.zeros(1, 1, 1, 1)
    with pytest.warns(UserWarning, match="training without Triton, which fails: "):
        assert training_tuned.unit_backend(x) == ""
    assert training_tuned.unit_backend(x) == ""  # without a second warning
