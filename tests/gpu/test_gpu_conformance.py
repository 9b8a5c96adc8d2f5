"""The device against the CPU simulator, call by call on the same inputs.

What has the same operations in the same order has the same bits: batch norm in inference, and
convolutions in strict float32 by a given plan. Tensor cores add in an order, and with guard bits,
that NVIDIA does not publish: there the two may differ by what float32 accumulation may, which a
rounding to half precision turns, now and then, into one unit in the last place.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from device import Device
from small_calls import Call, calls
from tolerances import error
from torch.utils._pytree import tree_leaves

HERE = Path(__file__).resolve().parent
OPERATORS = (
    "bn_add_relu", "bn_add_relu_backward", "conv_bn_add_relu", "conv_statistics",
    "conv_bn_add_relu_planned", "conv_bn_add_relu_packed", "residual_block",
    "conv_bn_relu_maxpool", "block_end", "block_end_backward", "bn_coefficients",
    "bn_update_running", "bn_backward_coefficients", "conv_forward", "conv_backward",
)  # fmt: skip

#: Relative L2 distance of what need not have the same bits.
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-4, torch.bfloat16: 2e-3}


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory):
    """The simulator's results, computed in a process of its own, with the calls."""
    import simulator

    reason = simulator.missing()
    if reason:
        pytest.skip(reason)
    path = tmp_path_factory.mktemp("simulator") / "results.pt"
    command = [sys.executable, str(HERE / "run_small_calls.py"), "simulator", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    results = torch.load(path, weights_only=True)
    return list(zip(calls(), results, strict=True))


def same_bits_expected(call: Call) -> bool:
    x = call.arguments[0]
    if call.operator == "bn_add_relu":
        return not call.label.startswith("training")
    planned = call.operator == "conv_bn_add_relu_planned"
    return planned and x.dtype is torch.float32 and not call.tf32


@pytest.mark.parametrize("operator", OPERATORS)
def test_device_and_simulator_agree(executed, operator):
    pairs = [(call, result) for call, result in executed if call.operator == operator]
    assert pairs
    device, differences = Device(), []
    for call, expected in pairs:
        torch.backends.cudnn.allow_tf32 = call.tf32
        result = getattr(device, call.operator)(*call.arguments)
        for i, (ours, theirs) in enumerate(
            zip(tree_leaves(result), tree_leaves(expected), strict=True)
        ):
            if theirs is None:  # of an operator that writes to its arguments
                continue
            assert ours.shape == theirs.shape
            assert ours.dtype is theirs.dtype
            assert ours.stride() == theirs.stride()
            if same_bits_expected(call):
                if not torch.equal(ours, theirs):
                    count = int((ours != theirs).sum())
                    differences.append(f"{call.label}, result {i}: {count} bits differ")
            elif not error(ours, theirs) <= LIMITS[ours.dtype]:
                differences.append(f"{call.label}, result {i}: {error(ours, theirs):.1e}")
    assert not differences, "\n".join(differences)


def test_every_operator_is_compared(executed):
    assert {call.operator for call, _ in executed} == set(OPERATORS)
