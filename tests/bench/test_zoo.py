"""Other libraries' networks: the same answers fused and frozen, and as many groups as recorded.

Which networks there are and how many of their batch norms run fused is recorded in
``benchmarks/results/coverage.json``, which ``fused-resnet coverage --json`` writes; here each is
built with real numbers, counted again, and run. ``make test`` has a few small ones, ``make
test-all`` all.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import assert_same, image, results
from operator_calls import OperatorCalls
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.bench import environment, zoo
from fused_resnet.bench.coverage import count_fused
from fused_resnet.nn.module_kinds import is_norm

RECORDED = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "coverage.json"

#: In ``make test``: every kind of block, nothing large.
SLICE = (
    "torchvision:resnet18",
    "torchvision:mobilenet_v3_small",
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:resnet18/fpn",
    "timm:test_resnet",
    "timm:resnetblur18",
    "timm:hrnet_w18_small",
    "timm:resnet18/features_only",
)

#: In float64 with two copies more, a network beyond this takes more memory than a machine may have.
LARGEST = 200_000_000

#: Heights and widths of what divides its maps into windows, or pools more often than 64 allows.
SIZES = {
    "torchvision:maxvit_t": 224,
    "torchvision:inception_v3": 96,
    "smp:PAN/resnet34": 128,
    "smp:PAN/resnet50": 128,
}

#: Of so many blocks each amplifies the rounding of those before: with the others' numbers a change
#: of the input by 1e-15 moves the answer by 1e-2. Their batch norms' weights are half as large.
DEEPEST = ("timm:resnetrs350", "timm:resnetrs420")


def recorded() -> dict[str, dict[str, Any]]:
    if not RECORDED.exists():
        return {}
    return {row["network"]: row for row in json.loads(RECORDED.read_text())["networks"]}


NETWORKS = [pytest.param(name, marks=[] if name in SLICE else pytest.mark.slow)
            for name in recorded()]  # fmt: skip


def built(name: str) -> nn.Module:
    """With every normalisation's parameters and statistics drawn, in float64 and eval."""
    package = zoo.PACKAGES[name.partition(":")[0]]
    pytest.importorskip(package, reason=f"the network is {package}'s: fused_resnet[models] has it")
    parameters = sum(p.numel() for p in zoo.build_without_memory(name).parameters())
    if parameters > LARGEST:
        pytest.skip(f"{parameters / 1e6:.0f} million parameters are too many to run in float64")
    torch.manual_seed(1)
    model = zoo.build(name).double()
    g = torch.Generator().manual_seed(2)
    for norm in filter(is_norm, model.modules()):
        for key, low, high in (
            ("weight", *((0.25, 0.6) if name in DEEPEST else (0.5, 1.2))),
            ("bias", -0.2, 0.2),
            ("running_mean", -0.2, 0.2),
            ("running_var", 0.6, 1.6),
        ):
            tensor = getattr(norm, key)
            if tensor is not None:
                draw = torch.rand(tensor.shape, generator=g, dtype=torch.float64)
                tensor.data.copy_(low + (high - low) * draw)
    return model.eval()


def images(name: str, batch: int = 1) -> Any:
    size = SIZES.get(name, 64)
    x = image(batch, 3, size, size)
    return [x[0]] if _is_detector(name) else x


def _is_detector(name: str) -> bool:
    family = recorded()[name]["family"]
    return family == "torchvision, detection" and not name.endswith("/fpn")


def run(model: nn.Module, name: str, x: Any) -> dict[str, Tensor]:
    """Every tensor of the network's result, in order; of a detector its feature maps."""
    if _is_detector(name):
        # Boxes are chosen by comparing scores, which nearly equal numbers may decide differently.
        x = torch.stack(x)
        y = model.backbone(x)
    else:
        y = model(x)
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(y) if isinstance(leaf, Tensor)]
    if not tensors:  # an output class of transformers, which is a dict
        tensors = [t for value in y.values() if value is not None for t in (
            value if isinstance(value, (tuple, list)) else [value])]  # fmt: skip
    assert tensors
    return {str(index): tensor for index, tensor in enumerate(tensors)}


@pytest.mark.parametrize("name", NETWORKS)
def test_network(name: str) -> None:
    """Answers within 1e-9 of the eager ones, and as many groups as were recorded."""
    model, x = built(name), images(name)
    row = recorded()[name]
    with torch.no_grad():
        expected = run(model, name, x)
        assert all(t.isfinite().all() for t in expected.values())
        assert any(t.abs().max() > 0 for t in expected.values())
        fused = fr.fuse(model)
        counts = count_fused(fused)
        versions = json.loads(RECORDED.read_text())["versions"]
        changed = {k: v for k, v in environment.versions().items() if versions.get(k) != v}
        assert (counts.groups, counts.fused, counts.left) == (
            row["groups"],
            row["fused"],
            row["left"],
        ), f"not as recorded; versions that differ: {changed}"
        assert_close(run(fused, name, x), expected)
        del fused
        assert_close(run(fr.freeze(model), name, x), expected)


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Within 1e-9 of the truth's norm."""
    assert got.keys() == expected.keys()
    for key, truth in expected.items():
        assert got[key].shape == truth.shape
        distance = (got[key] - truth).norm() / truth.norm().clamp_min(1e-30)
        assert distance <= 1e-9, f"result {key}: relative distance {distance:.1e}"


@pytest.mark.parametrize("name", [name for name in SLICE if "resnet18" in name or "test_" in name])
def test_what_is_counted_is_what_runs(name: str) -> None:
    """One operation a group in a forward, and of PyTorch's batch norms none.

    The backend is named: ``auto`` would give those convolutions to PyTorch that are faster there on
    this processor.
    """
    fused, row = fr.fuse(built(name)), recorded()[name]
    with fr.use_backend("cpu"), torch.no_grad(), OperatorCalls() as ran:
        run(fused, name, images(name))
    calls = ran.counts("fused_resnet::")
    assert calls == row["operations"]
    assert sum(calls.values()) == row["fused"]
    norms = sum("batch_norm" in called for called in ran.counts("aten::").elements())
    assert norms == row["groups"] - row["fused"] == 0


TRAINED = ("torchvision:resnet18", "torchvision:shufflenet_v2_x0_5", "timm:test_resnet",
           "timm:hrnet_w18_small")  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
def test_one_training_step(name: str) -> None:
    """Loss, every gradient and every running statistic, eager and fused."""
    model = built(name).train()
    for dropout in [m for m in model.modules() if isinstance(m, nn.Dropout)]:
        dropout.p = 0.0
    fused = fr.fuse(copy.deepcopy(model))
    x = image(4, 3, 64, 64)
    assert_same(results(fused, x), results(model, x))


def test_all_of_the_slice_is_recorded() -> None:
    assert set(SLICE) | set(TRAINED) <= set(recorded())
