"""FlopCounterMode sees through every operator: the counts are those of the unfused network."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fused_resnet as fr
from fused_resnet.ops.flops import FORMULAS


def flops(model: torch.nn.Module, x: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops()


NETWORKS = {
    # Basic blocks with and without a projection, the stem, and the frozen forms of all.
    "resnet18": (lambda: fr.resnet18(), (2, 3, 64, 64)),
    # Bottlenecks with groups.
    "resnext50_32x4d": (lambda: fr.resnext50_32x4d(), (1, 3, 64, 64)),
    # Blocks in one operator, shortcuts without parameters.
    "cifar_resnet20": (lambda: fr.cifar_resnet(20), (2, 3, 32, 32)),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("form", [fr.fuse, fr.freeze], ids=["fused", "frozen"])
def test_a_network_counts_as_unfused(name, form):
    make, shape = NETWORKS[name]
    model, x = make().eval(), torch.zeros(shape)
    with fr.use_backend("reference"):
        expected = flops(model, x)
    assert flops(form(model), x) == expected > 0


def test_every_operator_with_a_convolution_has_a_formula():
    """Packing and batch norm alone count nothing, as in PyTorch."""
    names = {schema.partition("(")[0] for schema in fr._C.schemas()}
    convolving = {n for n in names if n.startswith(("conv", "residual"))}
    assert convolving - {"conv_bn_add_relu_planned"} <= set(FORMULAS)
