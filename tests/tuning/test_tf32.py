"""tf32 is read per operator, so both of PyTorch's ways to set it work."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_resnet.bench import gpu_cells
from fused_resnet.inference import cuda_graphs
from fused_resnet.ops.dispatch import call_key
from fused_resnet.tuning import tuner
from fused_resnet.tuning.tf32 import conv_allows_tf32, matmul_allows_tf32, tf32_set_to

CONV, MATMUL = torch.backends.cudnn.conv, torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, MATMUL.allow_tf32
    yield
    cudnn.allow_tf32, MATMUL.allow_tf32 = before


@pytest.mark.parametrize("allowed", [True, False])
def test_the_older_flags_are_read(allowed: bool) -> None:
    torch.backends.cudnn.allow_tf32 = MATMUL.allow_tf32 = allowed
    assert conv_allows_tf32() is allowed
    assert matmul_allows_tf32() is allowed


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_a_single_operators_setting_is_read(precision: str) -> None:
    torch.backends.cudnn.allow_tf32 = precision == "ieee"
    CONV.fp32_precision = precision
    with pytest.raises(RuntimeError):  # as PyTorch cannot say one thing of two operators
        _ = torch.backends.cudnn.allow_tf32
    assert conv_allows_tf32() is (precision == "tf32")


def test_everything_that_asks_works_once_a_program_set_an_operator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tuner's key of a CUDA device, a graph's settings, and the benchmarks' cells."""
    monkeypatch.setattr(tuner, "_cuda_machine", lambda index: "a card")
    CONV.fp32_precision = "ieee"
    assert tuner.machine_of(torch.device("cuda", 0)) == "a card, strict float32"
    before = cuda_graphs._settings("cuda")
    CONV.fp32_precision = "tf32"
    assert tuner.machine_of(torch.device("cuda", 0)) == "a card, tf32"
    with FakeTensorMode():
        assert True in tuner._fingerprint((torch.empty(1, 8, 4, 4, device="cuda"),))
    assert cuda_graphs._settings("cuda") != before
    with gpu_cells.settings("float32"):
        assert not conv_allows_tf32()
    assert conv_allows_tf32()


def test_triton_plans_once_a_program_set_an_operator() -> None:
    plan = pytest.importorskip(
        "fused_resnet.backends.triton._conv_plan", reason="plans are Triton's"
    )
    x = torch.empty(1)
    CONV.fp32_precision = "ieee"
    assert plan.precision_of(x) == "ieee"
    CONV.fp32_precision = "tf32"
    assert plan.precision_of(x) == "tf32"


def test_settings_come_back_after_an_exception() -> None:
    CONV.fp32_precision, MATMUL.fp32_precision = "tf32", "ieee"
    with pytest.raises(ZeroDivisionError), tf32_set_to(False):
        _ = 1 / int(conv_allows_tf32())
    assert (CONV.fp32_precision, MATMUL.fp32_precision) == ("tf32", "ieee")


def test_a_checked_call_is_asked_again_with_another_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which backend is the fastest depends on it. The tensor says that it is on CUDA."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    keys = []
    for precision in ("ieee", "tf32", "ieee"):
        CONV.fp32_precision = precision
        keys.append(call_key("conv_bn_add_relu", (torch.empty(1, 1, 1, 1),), ()))
    assert keys[0] is not None
    assert keys[0] == keys[2] != keys[1]
