"""What only Triton's stem has: every configuration of its tiles."""

from __future__ import annotations

import pytest
import torch
from precisions import BFLOAT16, FLOAT32, TF32
from shapes import STEMS
from stem_operands import check

from fused_resnet.backends.triton._conv_plan import precision_of
from fused_resnet.backends.triton.conv_bn_relu_maxpool import CONFIGS


def configurations() -> list:
    found = []
    for precision in (BFLOAT16, TF32, FLOAT32):
        with precision.set():
            table = CONFIGS[precision_of(torch.empty(0, dtype=precision.dtype))]
        found += [
            pytest.param(precision, config, id=f"{precision}-{i}") for i, config in enumerate(table)
        ]
    return found


@pytest.mark.parametrize(("precision", "config"), configurations())
@pytest.mark.parametrize("case", [STEMS[1], STEMS[5]], ids=str)
def test_every_configuration(interpreted, precision, config, case):
    check(interpreted, case, precision, config=config)
