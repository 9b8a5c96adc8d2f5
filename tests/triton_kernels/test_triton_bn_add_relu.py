"""What only Triton's batch norm has: every configuration of its tiles."""

from __future__ import annotations

import pytest
import torch
from bn_operands import EPS, check_backward, check_forward, laid_out
from cases import FORMATS, normal

from fused_resnet.backends.triton._bn_map import CONFIGS

formats = pytest.mark.parametrize("fmt", FORMATS)


class Configured:
    """Operators with a configuration forced on them, in the place of the interpreter's own."""

    def __init__(self, interpreted, config) -> None:
        self._interpreted, self._config = interpreted, config

    @property
    def ops(self):
        return self

    def __getattr__(self, name):
        operator = getattr(self._interpreted.ops, name)
        return lambda *args: operator(*args, config=self._config)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c[0]}x{c[1]}")
@formats
def test_every_configuration(interpreted, config, fmt):
    """Several slabs, and tiles and planes that end in the middle of a tile."""
    forced, shape = Configured(interpreted, config), (3, 69, 21, 13)
    check_forward(forced, torch.bfloat16, fmt, shape, training=True)
    check_backward(forced, torch.bfloat16, fmt, shape)


@formats
def test_backward_sums_what_cancels_in_tiles_of_few_rows(interpreted, fmt):
    """Each lane then adds many terms, which are far larger than their sum."""
    x, grad = normal(2, 2, 4, 60, 60, dtype=torch.float32)
    grad += 100.0 * x.sign()
    grad -= grad.mean((0, 2, 3), keepdim=True)
    x, grad = laid_out(fmt, x, grad)
    _, _, dbias, _ = interpreted.ops.bn_add_relu_backward(
        grad, x, None, None, torch.zeros(4), torch.ones(4), True, EPS, False, False,
        config=CONFIGS[-1],
    )  # fmt: skip
    truth = grad.double().sum((0, 2, 3))
    assert (truth.abs() < 1e-7 * grad.double().abs().sum((0, 2, 3))).all()
    torch.testing.assert_close(dbias.double(), truth, rtol=1e-6, atol=1e-8)
