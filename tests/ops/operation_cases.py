"""Parametrisations and helpers of the operations' tests."""

from __future__ import annotations

import pytest
import torch
from cases import CONVS, FORMATS, MAPS, Conv, batch_norm, conv_weight, doubled, normal
from tolerances import DTYPES

from fused_resnet import ops, reference

#: Backends that run on every machine.
BACKENDS = ("reference", "cpu")

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
formats = pytest.mark.parametrize("fmt", FORMATS)
convs = pytest.mark.parametrize("case", CONVS, ids=str)
maps = pytest.mark.parametrize("shape", MAPS.values(), ids=MAPS)
extras = pytest.mark.parametrize(
    ("relu", "residual"), [(True, True), (True, False), (False, True), (False, False)]
)


#: Convolutions of stems; their pool has the default window.
STEMS = [
    Conv("resnet", (2, 3, 64, 64), 64, (7, 7), {"stride": 2, "padding": 3}),
    Conv("odd", (1, 3, 45, 37), 24, (7, 7), {"stride": 2, "padding": 3}),
    Conv("deep-stem", (1, 32, 19, 19), 33, (3, 3), {"stride": 1, "padding": 1}),
    Conv("many-bands", (1, 3, 224, 112), 64, (7, 7), {"stride": 2, "padding": 3}),
]


def keeps_format(y: torch.Tensor, fmt: str) -> bool:
    return y.is_contiguous(memory_format=FORMATS[fmt])


def run_conv(case: Conv, dtype: torch.dtype, fmt: str, op: str, *, r: bool, **extra):
    """The result, PyTorch's own and the truth of one convolution case."""
    x = normal(*case.x, dtype=dtype).contiguous(memory_format=FORMATS[fmt])
    w = conv_weight(case, dtype)
    bn = batch_norm(case.k, dtype)
    arguments = {**case.args, **extra}
    fused, plain = getattr(ops, op), getattr(reference, op)
    added: list[torch.Tensor] = []
    if r:
        shape = plain(x, w, *bn, **case.args).shape
        added = [normal(*shape, dtype=dtype).contiguous(memory_format=FORMATS[fmt])]
    truth = plain(doubled(x), doubled(w), *doubled(bn), *doubled(added), **arguments)
    eager = plain(x, w, *bn, *added, **arguments)
    return fused(x, w, *bn, *added, **arguments), eager, truth
