"""The arithmetic of a training step's bytes, against counts by hand and by PyTorch's own hooks."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import fused_resnet as fr
from fused_resnet.roofline import training

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "training_bytes.py"


def test_a_layer_by_hand() -> None:
    """layer1.0.conv2 of ResNet-50 at batch 2: 64 channels of 56 x 56 in and out, in 2 bytes."""
    z, w = 2 * 64 * 56 * 56 * 2, 64 * 64 * 9 * 2
    of = {
        name: {p.what: p for p in training.passes("resnet50", 2, "bfloat16", name)
               if p.path == "layer1.0.conv2"}
        for name in training.IMPLEMENTATIONS
    }  # fmt: skip
    ours = of["primitives"]
    assert {k: (p.read, p.written) for k, p in ours.items()} == {
        "conv_forward": (z + w, z),
        "conv_backward, input": (3 * z + w, z),
        "conv_backward, weight": (3 * z, w),
    }
    assert sum(p.bytes for p in of["unfused"].values()) == 19 * z + 3 * w
    assert sum(p.bytes for p in of["batch norm"].values()) == 16 * z + 3 * w


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_what_is_kept_is_what_autograd_keeps(name) -> None:
    """Maps that a step of the unfused and of the fused network saves, a storage counted once."""
    model = getattr(fr, name)().train()
    x = torch.randn(1, 3, 64, 64)
    for implementation, backend in (("unfused", "reference"), ("primitives", "cpu")):
        kept: dict[int, int] = {}

        def pack(t, kept=kept):
            if t.dim() == 4 and not isinstance(t, torch.nn.Parameter):
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with (
            fr.use_backend(backend),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        ):
            y = model(x)  # alive, and with it what it keeps
        assert y.requires_grad
        assert training.saved_bytes(name, "float32", implementation, 64) == pytest.approx(
            sum(kept.values()), rel=0.02
        )


def test_the_results_are_of_this_arithmetic() -> None:
    spec = importlib.util.spec_from_file_location("training_bytes", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert json.loads(script.FILE.read_text()) == script.document()


def test_an_unknown_implementation_is_named() -> None:
    with pytest.raises(
        ValueError, match="implementation: expected one of unfused, batch norm, primitives"
    ):
        training.passes("resnet50", 1, "bfloat16", "magic")
