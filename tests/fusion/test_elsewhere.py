"""Fused and frozen models where they can't run: one line that says what to do instead."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.nn import BNAddReLU2d

MAKE: dict[str, Callable[[], nn.Module]] = {
    "fused": lambda: fr.fuse(plain()).eval(),
    "frozen": lambda: fr.freeze(plain()),
    "module": lambda: nn.Sequential(nn.Conv2d(3, 8, 1), BNAddReLU2d(8)).eval(),
}


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2)
    ).eval()


def image() -> Tensor:
    return torch.randn(2, 3, 4, 4)


INSTEAD = "export the model that fuse() or freeze() was given, which computes the same"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
def test_onnx_export_says_what_to_export(tmp_path: Path, kind: str, dynamo: bool) -> None:
    if dynamo:
        pytest.importorskip("onnxscript", reason="the exporter's package")
    model = MAKE[kind]()
    with pytest.raises(Exception, match=re.escape(INSTEAD)) as caught:
        torch.onnx.export(model, (image(),), tmp_path / "m.onnx", dynamo=dynamo)
    if not dynamo:
        assert type(caught.value) is RuntimeError
        assert "\n" not in str(caught.value)
    model(image())  # runs as before


@pytest.mark.filterwarnings("ignore")
def test_the_model_that_was_fused_exports(tmp_path: Path) -> None:
    """What the message says to do works, also after training the fused one."""
    pytest.importorskip("onnx", reason="the exporter's package")
    model = plain()
    fr.fuse(model)
    torch.onnx.export(model, (image(),), tmp_path / "m.onnx", dynamo=False)
    assert (tmp_path / "m.onnx").stat().st_size > 0


@pytest.fixture(scope="module")
def one_process() -> Iterator[object]:
    distributed = torch.distributed
    if not distributed.is_available():
        pytest.skip("torch is built without torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh

    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("kind", [*MAKE, "training", "function"])
def test_distributed_tensors_are_refused_in_one_line(one_process: object, kind: str) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    x = distribute_tensor(image(), one_process, [Shard(0)])
    if kind == "function":
        statistics = torch.zeros(3), torch.ones(3)

        def call(x: Tensor) -> Tensor:
            return fr.ops.bn_add_relu(x, None, None, *statistics)
    elif kind == "module":
        call = MAKE[kind]()[1]
        x = distribute_tensor(torch.randn(2, 8, 4, 4), one_process, [Shard(0)])
    else:
        call = fr.fuse(plain()).train() if kind == "training" else MAKE[kind]()
    with pytest.raises(
        RuntimeError, match=r"a DTensor is not supported: run the model .* x.to_local"
    ):
        call(x)
    assert call(x.to_local()).shape[0] == 2


@pytest.mark.parametrize("types", [{nn.Linear}, None], ids=["linear", "default"])
def test_quantising_a_frozen_model_is_refused(types: set[type] | None) -> None:
    """It used to do nothing, as the types of a frozen model's modules are its own."""
    frozen = fr.freeze(plain())
    before = frozen(torch.ones(1, 3, 4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(
            RuntimeError, match=r"quantisation: this model is frozen .* use the model"
        ):
            torch.ao.quantization.quantize_dynamic(frozen, types)
        with pytest.raises(RuntimeError, match="quantisation: this model is frozen"):
            frozen.qconfig = torch.ao.quantization.default_qconfig
    assert torch.equal(frozen(torch.ones(1, 3, 4, 4)), before)
    assert not hasattr(frozen, "qconfig")
