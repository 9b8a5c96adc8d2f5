"""The roofline: single layers against numbers by hand, networks against published totals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fused_resnet.bench import gpu_results
from fused_resnet.cli import main
from fused_resnet.models.sources import MODELS
from fused_resnet.roofline import CARDS, Kernel, card_of, kernels, total
from fused_resnet.roofline.layers import network

Capture = pytest.CaptureFixture[str]
H100 = CARDS["H100"]


def by_path(fusion: str, model: str = "resnet50", batch: int = 256) -> dict[str, Kernel]:
    return {kernel.path: kernel for kernel in kernels(model, batch, "bfloat16", fusion)}


# Single layers by hand, batch 256, two bytes an element


def test_a_1x1_with_the_residual() -> None:
    """64 to 256 channels on 56x56, the block's end."""
    kernel = by_path("conv")["layer1.1.conv3"]
    pixels = 256 * 56 * 56  # 802,816
    assert kernel.steps == ("conv", "bn", "add", "relu")
    assert kernel.read == pixels * 64 * 2 + 64 * 256 * 2 + pixels * 256 * 2 == 513_835_008
    assert kernel.written == pixels * 256 * 2 == 411_041_792
    assert kernel.flops == 2 * pixels * 64 * 256 == 26_306_674_688
    assert kernel.intensity == pytest.approx(28.44, abs=0.01)
    assert kernel.bound(H100, "bfloat16") == "memory"
    # 924,876,800 bytes at 3.35 TB/s
    assert kernel.seconds(H100, "bfloat16") * 1e6 == pytest.approx(276.08, abs=0.01)


def test_a_3x3_that_computes_longer_than_it_moves() -> None:
    """256 channels on 14x14."""
    kernel = by_path("conv")["layer3.1.conv2"]
    pixels = 256 * 14 * 14
    assert kernel.read == pixels * 256 * 2 + 256 * 256 * 9 * 2
    assert kernel.written == pixels * 256 * 2
    assert kernel.flops == 2 * 9 * pixels * 256 * 256 == 59_190_018_048
    assert kernel.bound(H100, "bfloat16") == "compute"
    # 59.19 GFLOP at 990 TFLOP/s
    assert kernel.seconds(H100, "bfloat16") * 1e6 == pytest.approx(59.79, abs=0.01)


def test_a_strided_1x1_reads_one_pixel_in_four() -> None:
    kernel = by_path("conv")["layer2.0.downsample.0"]
    assert kernel.steps == ("conv", "bn")
    assert kernel.read == 256 * 28 * 28 * 256 * 2 + 256 * 512 * 2
    assert kernel.written == 256 * 28 * 28 * 512 * 2


def test_a_strided_3x3_reads_all() -> None:
    kernel = by_path("conv")["layer2.0.conv2"]
    assert kernel.read == 256 * 56 * 56 * 128 * 2 + 128 * 128 * 9 * 2
    assert kernel.written == 256 * 28 * 28 * 128 * 2


def test_unfused_each_step_reads_and_writes_the_map() -> None:
    found = by_path("none")
    one_map = 256 * 56 * 56 * 256 * 2
    assert (found["layer1.0.bn3"].read, found["layer1.0.bn3"].written) == (one_map, one_map)
    assert found["layer1.0.downsample.1"].bytes == 2 * one_map
    assert (found["layer1.0"].read, found["layer1.0"].written) == (2 * one_map, one_map)
    assert found["layer1.0.relu"].bytes == 2 * one_map  # the last of the block's three
    assert found["layer1.0"].flops == 0
    assert found["maxpool"].read == 256 * 112 * 112 * 64 * 2
    assert found["maxpool"].written == 256 * 56 * 56 * 64 * 2


def test_a_block_and_the_stem_in_one() -> None:
    found = by_path("block")
    assert found["conv1"].steps == ("conv", "bn", "relu", "maxpool")
    assert found["conv1"].read == 256 * 224 * 224 * 3 * 2 + 64 * 3 * 49 * 2
    assert found["conv1"].written == 256 * 56 * 56 * 64 * 2
    block = found["layer1.0"]
    weights = 64 * 64 + 64 * 64 * 9 + 64 * 256 + 64 * 256
    assert block.read == 256 * 56 * 56 * 64 * 2 + weights * 2
    assert block.written == 256 * 56 * 56 * 256 * 2
    assert block.flops == 2 * 256 * 56 * 56 * weights
    assert "layer3.0" not in found
    assert "layer3.0.conv1" in found


def test_groups_divide_weight_and_flops() -> None:
    kernel = by_path("conv", "resnext50_32x4d")["layer1.1.conv2"]
    assert kernel.flops == 2 * 256 * 56 * 56 * 128 * (128 // 32) * 9
    assert kernel.read == 256 * 56 * 56 * 128 * 2 + 128 * 4 * 9 * 2


def test_precision_sets_bytes_and_peak() -> None:
    half, tf32, single = (
        kernels("resnet18", 1, precision, "conv")[0] for precision in ("float16", "tf32", "float32")
    )
    assert tf32.bytes == single.bytes == 2 * half.bytes
    assert single.seconds(H100, "float32") > tf32.seconds(H100, "tf32")


# Whole networks


@pytest.mark.parametrize(
    ("fusion", "thousand"),
    [("none", 20.1), ("conv", 54.2), ("block", 90.2), ("every block", 104.1)],
)
def test_the_designs_table(fusion: str, thousand: float) -> None:
    """ResNet-50, batch 256, bfloat16, an H100; to the digits that the design gives."""
    seconds = total(kernels("resnet50", 256, "bfloat16", fusion), H100, "bfloat16")
    assert round(256 / seconds / 1e3, 1) == thousand


#: What `make check` compares: each kind of block. Deeper and wider networks repeat them.
QUICK = ("resnet18", "resnet50", "resnext50_32x4d")


@pytest.mark.parametrize(
    "model", [pytest.param(m, marks=() if m in QUICK else pytest.mark.thorough) for m in MODELS]
)
def test_shapes_and_flops_are_those_of_torchvision(model: str) -> None:
    """Against the shapes that hooks see in torchvision's network, and torch's flop counter."""
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        reference = getattr(torchvision.models, model)().eval()
        images = torch.empty(2, 3, 160, 160)
    seen: dict[str, tuple[torch.Size, torch.Size]] = {}
    for name, module in reference.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda _, given, y, name=name: seen.update({name: (given[0].shape, y.shape)})
            )
    with FlopCounterMode(display=False) as counter:
        reference(images)
    net = network(model, 160)
    convs = [net.stem, *(conv for block in net.blocks for conv in block.all_convs)]
    assert {c.path for c in convs} == set(seen)
    for conv in convs:
        given, result = seen[conv.path]
        assert given == (2, conv.channels, conv.size, conv.size)
        assert result == (2, conv.filters, conv.out, conv.out)
    for fusion in ("none", "conv", "block"):
        parts = kernels(model, 2, "bfloat16", fusion, 160)
        assert sum(kernel.flops for kernel in parts) == counter.get_total_flops()
    named = {name for name, _ in reference.named_modules()}
    assert {kernel.path for kernel in kernels(model, 2, "bfloat16", "none", 160)} <= named


def test_more_fusion_never_moves_more() -> None:
    for model in ("resnet18", "resnet152", "resnext50_32x4d"):
        moved = [
            sum(kernel.bytes for kernel in kernels(model, 8, "float16", fusion))
            for fusion in ("none", "conv", "block", "every block")
        ]
        assert moved == sorted(moved, reverse=True)
        assert len(set(moved)) == 4


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("vgg16", 1, "bfloat16", "conv"), "vgg16"),
        (("resnet18", 1, "int8", "conv"), "int8"),
        (("resnet18", 1, "bfloat16", "all"), "fusion"),
    ],
)
def test_wrong_arguments_are_named(arguments: Any, named: str) -> None:
    with pytest.raises(ValueError, match=f"roofline: .*{named}"):
        kernels(*arguments)


def test_cards_are_known_by_their_full_name_only() -> None:
    assert card_of("NVIDIA H100 80GB HBM3") is H100
    assert card_of("NVIDIA H100 PCIe") is None
    assert card_of("NVIDIA A100-SXM4-40GB") is None
    assert card_of("NVIDIA GeForce RTX 4090") is None


# The command


def command(*arguments: str) -> int:
    try:
        return main(["roofline", *arguments])
    except SystemExit as stopped:
        return int(stopped.code or 0)


def results_file(path: Path, device: str = "NVIDIA H100 80GB HBM3") -> Path:
    """A made-up results file: one of our kernels, and PyTorch's beside it."""
    what = by_path("conv")["layer1.1.conv3"].what
    row = {"fusion": "conv", "batch": 256, "precision": "bfloat16", "status": "ok", "what": what}
    layers = [
        {**row, "provider": "eager", "median_us": 900.0},
        {**row, "provider": "packed", "median_us": 432.1},
        {**row, "provider": "live", "median_us": 450.0},
        {**row, "provider": "eager", "median_us": 155.5, "what": "maxpool 3x3/2 64, 112x112"},
        {**row, "provider": "packed", "status": "wrong", "what": "conv 9x9"},
    ]
    document = {"format": gpu_results.FORMAT, "device": {"name": device}, "layers": layers}
    document |= {"versions": {}, "commit": "abc", "command": "make gpu", "phases": []}
    path.write_text(json.dumps(document | {"networks": [], "training": []}))
    return path


def test_help_says_what_a_block_is(capsys: Capture) -> None:
    assert command("--help") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "every basic block or bottleneck of stages 1 and 2" in out
    assert "A100,H100,B200" in out


def test_the_table(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")  # fewer wrap the names of the kernels
    assert command("resnet50", "--fusion", "conv", "--device", "H100,A100") == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if "layer1.0.conv3" in line)
    for cell in ("conv 1x1 64 to 256, 56x56 + bn + add + relu", " 3 ", "513.8", "276.1 m"):
        assert cell in row
    assert "59.8 c" in out
    assert [line.split()[-4::2] for line in out.splitlines() if "every block" in line] == [
        ["104.1", "37.5"]
    ]


def test_json_has_every_kernel(capsys: Capture) -> None:
    assert command("resnet50", "--fusion", "block", "--device", "H100", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    parts = kernels("resnet50", 256, "bfloat16", "block")
    assert [row["path"] for row in document["kernels"]] == [kernel.path for kernel in parts]
    micro = sum(row["cards"]["H100"]["us"] for row in document["kernels"])
    assert document["ceilings"]["block"]["H100"] == pytest.approx(256e6 / micro)
    assert document["kernels"][0]["bytes_written"] == parts[0].written
    assert document["cards"]["H100"]["source"]


def test_measured_times_stand_beside_the_predicted(capsys: Capture, tmp_path: Path) -> None:
    path = results_file(tmp_path / "gpu-h100.json")
    assert command("resnet50", "--results", str(path), "--device", "H100,B200") == 0
    out = capsys.readouterr().out
    assert out.count("measured ") >= 2
    row = next(line for line in out.splitlines() if "layer1.0.conv3" in line)
    assert "432.1" in row  # ours, the packed form: neither the live one nor PyTorch's
    assert "155.5" in next(line for line in out.splitlines() if " maxpool " in line)
    assert "H100: measured in gpu-h100.json, at abc" in out
    assert "B200: nothing measured: no results file of that card" in out
    assert command("resnet50", "--results", str(path), "--device", "H100", "--batch", "1") == 0
    assert "has no layers of batch 1, bfloat16, fusion conv" in capsys.readouterr().out


def test_without_a_results_file_there_is_no_column(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("fused_resnet.cli.roofline.RESULTS", tmp_path)
    assert command("resnet50", "--device", "H100") == 0
    out = capsys.readouterr().out
    assert "measured " not in out.replace("nothing measured", "")
    assert "H100: nothing measured: no results file of that card in benchmarks/results" in out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["vgg16"], ["'vgg16'", "resnet50"]),
        (["resnet50", "--fusion", "all"], ["--fusion", "'all'", "block"]),
        (["resnet50", "--device", "V100"], ["--device", "'V100'", "H100"]),
        (["resnet50", "--dtype", "float64"], ["--dtype", "'float64'", "tf32"]),
        (["resnet50", "--batch", "0"], ["--batch", "'0'"]),
        (["resnet50", "--size", "16"], ["--size", "32"]),
        (["resnet50", "--results", "/no/such.json"], ["/no/such.json", "No such file"]),
        (["resnet50", "--results", __file__], ["no JSON", "make gpu"]),
    ],
    ids=" ".join,
)
def test_mistakes_give_one_line(arguments: list[str], named: list[str], capsys: Capture) -> None:
    assert command(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    for text in named:
        assert text in err


def test_a_foreign_results_file_is_refused(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "gpu-x.json"
    for content, named in (([1], "format 1"), ({"format": 2}, "format 1"), ({"format": 1}, "dev")):
        path.write_text(json.dumps(content))
        assert command("resnet50", "--results", str(path)) == 2
        assert named in capsys.readouterr().err
