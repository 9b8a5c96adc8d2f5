"""Blocks of timm and transformers run whole in training."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import assert_same, image, randomize, results

import fused_resnet as fr

TIMM = {
    "resnet18": 8,
    "resnet26": 8,
    "resnet18d": None,  # an average pool in its shortcuts: what is no block stays in groups
    "seresnet18": 0,  # squeeze-and-excite inside of the block
}


@pytest.mark.parametrize("name", TIMM)
def test_blocks_of_timm(name) -> None:
    timm = pytest.importorskip("timm", reason="timm's blocks are what is trained here")
    torch.manual_seed(0)
    eager = randomize(timm.create_model(name, num_classes=5)).double().train()
    fused = fr.fuse(copy.deepcopy(eager))
    x = image(2, 3, 33, 33)
    assert_same(results(fused, x), results(eager, x))
    whole = sum(not reason for _, reason in fr.report(fused).blocks)
    assert TIMM[name] is None or whole == TIMM[name]


@pytest.mark.parametrize("layer", ["basic", "bottleneck"])
def test_blocks_of_transformers(layer) -> None:
    transformers = pytest.importorskip(
        "transformers", reason="transformers' blocks are what is trained here"
    )
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[2, 1], layer_type=layer, num_labels=5
    )
    model = transformers.ResNetForImageClassification(config)
    eager = randomize(model.resnet).double().train()
    fused = fr.fuse(copy.deepcopy(eager))

    def outcome(m):
        m.zero_grad()
        y = m(image(2, 3, 33, 33)).pooler_output
        (y * image(*y.shape, seed=3)).sum().backward()
        return {k: p.grad for k, p in m.named_parameters()} | dict(m.named_buffers()) | {"y": y}

    assert_same(outcome(fused), outcome(eager))
    assert sum(not reason for _, reason in fr.report(fused).blocks) == 3
