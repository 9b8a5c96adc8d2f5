"""The per-layer table: its counts, its paths, and that the named algorithms ran."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fused_resnet import _C, ops
from fused_resnet.bench import layers
from fused_resnet.bench.providers import OURS
from fused_resnet.cli import main
from fused_resnet.models import resnet
from fused_resnet.roofline.layers import network


def profile_of(name: str, provider: str, batch: int = 2, size: int = 64) -> layers.Profile:
    model = getattr(resnet, name)().eval()
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    return layers.profile(*OURS[provider](model, images), forwards=2)


@pytest.mark.parametrize("provider", OURS)
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_every_convolution_is_there_with_its_flops(name: str, provider: str) -> None:
    """Held against the walk over the modules that the roofline makes."""
    found = profile_of(name, provider)
    net = network(name, 64)
    expected = {net.stem.path: net.stem.flops}
    expected |= {c.path: c.flops for block in net.blocks for c in block.all_convs}
    counted = {layer.path: layer.flops for layer in found.layers if layer.algorithm}
    assert counted == {path: 2 * flops for path, flops in expected.items()}
    assert all(len(layer.seconds) == 2 and layer.calls == 1 for layer in found.fused)
    head = next(layer for layer in found.layers if layer.path == "fc")
    assert head.flops == 2 * 2 * net.features * 1000


def test_bytes_are_the_least_that_must_move() -> None:
    by_path = {layer.path: layer for layer in profile_of("resnet50", "frozen_direct").fused}
    # Batch 2 at 64x64: the stem leaves 16x16, stage 2 8x8.
    x, y, weight = 2 * 64 * 16 * 16, 2 * 256 * 16 * 16, 64 * 256
    assert by_path["layer1.0.conv3"].bytes == 4 * (x + y + y + weight)  # with its residual
    # A strided 1x1 convolution reads every second pixel of every second row.
    x, y, weight = 2 * 256 * 8 * 8, 2 * 512 * 8 * 8, 256 * 512
    assert by_path["layer2.0.downsample.0"].bytes == 4 * (x + y + weight)


def test_flops_grow_with_the_batch() -> None:
    one, many = (
        {
            layer.path: layer
            for layer in profile_of("resnet18", "frozen_direct", batch, size=224).fused
        }
        for batch in (1, 8)
    )
    assert many["layer1.0.conv1"].flops == 8 * one["layer1.0.conv1"].flops


@pytest.mark.parametrize(
    ("size", "stride", "winograd"),
    [
        (28, 1, True),  # 49 tiles
        (3, 1, True),  # one tile: too few
        (28, 2, True),  # no such algorithm
        (28, 1, False),  # not asked for
    ],
)
def test_the_algorithm_named_is_the_one_that_ran(size: int, stride: int, winograd: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 64, size, size, generator=generator)
    weight = torch.randn(64, 64, 3, 3, generator=generator)
    one, zero = torch.ones(64), torch.zeros(64)

    def result(winograd: bool) -> torch.Tensor:
        return ops.conv_bn_add_relu_packed(
            x,
            ops.pack_conv_weight(weight),
            one,
            zero,
            winograd=winograd,
            weight_shape=(64, 64, 3, 3),
            stride=stride,
            padding=1,
        )

    named = _C.conv_algorithm(
        [1, 64, size, size],
        [64, 64, 3, 3],
        [stride, stride],
        [1, 1],
        [1, 1],
        1,
        torch.float32,
        winograd,
    )
    # The two algorithms round differently, so equal bits tell which one ran.
    assert (named == "direct") == torch.equal(result(winograd), result(False))
    assert (named == "winograd 4x4") == (size == 28 and stride == 1 and winograd)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_machine_is_measured(dtype: torch.dtype) -> None:
    top = layers.machine(dtype)
    # The slowest machine of the last twenty years does more than this, and none does 1e16.
    assert 1e8 < top.flops < 1e16
    assert 1e7 < top.read < 1e14
    assert 1e7 < top.copy < 1e14


def test_bench_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "layers.json"
    command = ["bench", "resnet18", "--layers", "--size=64", "--batch=1", "--rounds=2"]
    assert main([*command, "--threads=1", "--providers=frozen,fused", f"--json={path}"]) == 0
    printed = capsys.readouterr().out
    assert "layer4.1.conv2" in printed
    assert "winograd" in printed
    frozen, fused = json.loads(path.read_text())
    assert (frozen["provider"], fused["provider"]) == ("frozen", "fused")
    *rows, total, outside = frozen["layers"]
    assert total["gflop"] == pytest.approx(sum(r["gflop"] for r in rows if r["fused"]))
    times = [row["ms"] for row in (*rows, outside)]
    assert sum(times) == pytest.approx(frozen["forward_ms"])
    assert total["share_of_peak"] == pytest.approx(
        total["gflops_per_s"] / frozen["peak_gflops_per_s"]
    )


def test_bench_layers_refuses_what_it_cannot_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "resnet18", "--layers", "--providers=eager"]) == 2
    assert "--providers of fused, frozen, frozen_direct" in capsys.readouterr().err
