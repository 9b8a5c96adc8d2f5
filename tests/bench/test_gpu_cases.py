"""The cases of ``make gpu``: their shapes, plans and bounds, held against what they stand for."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import warm_process

from fused_resnet.bench.gpu import cudnn_graphs, plain, plans, providers, shapes, timing
from fused_resnet.bench.gpu.accuracy import check
from fused_resnet.bench.gpu.cases import Case, Target, UnavailableError, failed
from fused_resnet.bench.gpu.operands import conv_operands
from fused_resnet.bench.gpu.training_operands import training_operands
from fused_resnet.roofline import kernels

ROOT = Path(__file__).resolve().parents[2]


def target() -> Target:
    def none(backend: str) -> Any:
        raise AssertionError(backend)

    return Target(torch.device("cpu"), True, none, none)


def test_the_layers_are_the_rooflines() -> None:
    """Under the same names, by which results are found again."""
    theirs = [k.what for k in kernels("resnet50", 256, "bfloat16", "conv") if "bn" in k.steps]
    ours = {layer.what: layer.occurs for layer in shapes.resnet50()}
    assert {what: theirs.count(what) for what in theirs if "conv 7x7" not in what} == ours
    (stem,) = [k.what for k in kernels("resnet50", 256, "bfloat16", "block") if "maxpool" in k.what]
    assert f"{shapes.STEM.what} + maxpool" == stem


def test_sizes_are_those_of_pytorch() -> None:
    for layer in [*shapes.resnet50(), shapes.STEM]:
        x, w = (torch.empty(s, device="meta") for s in (layer.input(2), layer.weight_shape))
        y = torch.conv2d(x, w, None, layer.stride, layer.padding)
        assert tuple(y.shape) == layer.result(2)


def test_cudas_plans_are_those_of_its_planner() -> None:
    """The numbers of the planner's source; the layers of ResNet-50 and the stem by hand."""
    cuda = ROOT / "csrc" / "cuda"
    if not cuda.is_dir():
        pytest.skip("the package is tested without its sources")
    text = (cuda / "conv_bn_add_relu.cu").read_text()
    least, most = re.search(r"kLeastSteps = (\d+), kMostSplits = (\d+)", text).groups()  # type: ignore[union-attr]
    tiles = re.search(r"kConvTiles = (\d+)", (cuda / "conv_bn_add_relu.h").read_text())
    row = re.search(r"kStageRowBytes = (\d+)", (cuda / "kernels" / "arithmetic.cuh").read_text())
    assert tiles is not None
    assert row is not None
    found = (plans.CUDA_TILES, plans.STAGE_ROW_BYTES, plans.LEAST_STEPS, plans.MOST_SPLITS)
    assert found == (int(tiles[1]), int(row[1]), int(least), int(most))
    small = shapes.Layer(64, 256, 1, 1, 56, True, True)
    assert plans.cuda_plans(small, torch.bfloat16) == [(0, 1), (1, 1), (2, 1)]
    deep = shapes.Layer(512, 512, 3, 1, 7, False, True)
    assert {split for _, split in plans.cuda_plans(deep, torch.bfloat16)} == {1, 2, 4, 8, 16}
    # 147 terms of 3 channels, which fill no pack: 5 steps.
    assert plans.cuda_plans(shapes.STEM, torch.bfloat16) == [(2, 1)]


def test_a_single_wrong_element_is_found() -> None:
    """It hardly changes the relative error of thousands."""
    truth = torch.randn(300, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    truth[50, 50] = 0.0
    eager = truth.to(torch.bfloat16)
    good = check([eager], [eager], [truth], torch.bfloat16, {})
    assert (good["status"], good["error"] < good["limit"]) == ("ok", True)
    broken = eager.clone()
    broken[50, 50] = 0.3
    found = check([broken], [eager], [truth], torch.bfloat16, {})
    assert found["error"] < found["limit"]
    assert found["status"] == "wrong"
    assert "an element" in found["reason"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda y: y * 1.01, "relative error"),
        (lambda y: y.clone().fill_(float("nan")), "relative error inf"),
        (lambda y: y[:1], "shape"),
    ],
)
def test_what_is_wrong_is_said(change: Any, said: str) -> None:
    truth = torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    eager = truth.to(torch.bfloat16)
    found = check([eager, change(eager)], [eager] * 2, [truth] * 2, torch.bfloat16, {})
    assert found["status"] == "wrong"
    assert said in found["reason"]
    assert found.get("error") is None or found["error"] == found["error"]  # JSON has no NaN


def test_the_worst_of_several_results_counts() -> None:
    truth = torch.ones(8, 8, dtype=torch.float64)
    exact = truth.float()
    found = check([exact, exact * 1.5], [exact] * 2, [truth] * 2, torch.float32, {})
    assert found["error"] == pytest.approx(0.5)


def test_masks_are_the_same_in_float32_and_in_float64() -> None:
    """What makes a gradient's error one of arithmetic alone."""
    layer = shapes.Layer(64, 32, 1, 1, 56, False, True)
    o = training_operands(layer, 2, torch.bfloat16, torch.Generator().manual_seed(0))

    def before_relu(dtype: torch.dtype) -> torch.Tensor:
        return o.x.to(dtype) * o.scale.to(dtype).view(-1, 1, 1) + o.shift.to(dtype).view(-1, 1, 1)

    assert torch.equal(before_relu(torch.float32) > 0, before_relu(torch.float64) > 0)


def test_cells_time_what_is_right_and_say_what_is_not() -> None:
    def lacks() -> Any:
        raise UnavailableError("no such package")

    def raises() -> Any:
        raise RuntimeError("no kernel\nfor this")

    def breaks_later() -> Any:
        left = [1]

        def call() -> float:
            left[0] -= 1
            if left[0] < 0:
                raise RuntimeError("out of memory")
            return 0.0

        return [call]

    builds = {
        "good": lambda: [lambda: 0.0, lambda: 0.0], "wrong": lambda: [lambda: 1.0],
        "nan": lambda: [lambda: float("nan")], "lacks": lacks, "raises": raises,
        "own": lambda: [lambda: 5.0], "breaks": breaks_later,
    }  # fmt: skip
    rows = providers.cell(
        target(), builds, lambda result: result, 0.5, {"what": "w"}, errors={"own": lambda _: 0.25}
    )
    found = {row["provider"]: row for row in rows}
    assert {name: row["status"] for name, row in found.items()} == {
        "good": "ok", "wrong": "wrong", "nan": "wrong", "lacks": "unavailable",
        "raises": "failed", "own": "ok", "breaks": "failed",
    }  # fmt: skip
    assert found["good"]["median"] > 0
    assert found["own"]["error"] == 0.25
    assert found["raises"]["reason"] == "RuntimeError: no kernel"
    assert found["breaks"]["reason"] == "while timed: RuntimeError: out of memory"


def test_operands_take_turns() -> None:
    """Each set in turn, so that none is in the cache when it is read again."""
    seen: list[int] = []
    calls = [lambda i=i: seen.append(i) for i in range(3)]  # type: ignore[misc]
    run = timing._Events(calls, 7)
    run.run()
    assert seen == [0, 1, 2, 0, 1, 2, 0]


def test_packed_weights_are_in_the_order_of_the_kernels() -> None:
    layer = shapes.Layer(4, 3, 3, 1, 5, False, True)
    o = conv_operands(layer, 1, torch.bfloat16, torch.Generator().manual_seed(0))
    packed = o.packed.view(3, 3, 3, 4)
    assert packed[2, 1, 0, 3] == o.weight[2, 3, 1, 0]


def test_cudnns_graphs_are_no_dependency(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither without the package, nor with one that does not load, nor without a GPU."""
    layer = shapes.TINY[0]
    o = training_operands(layer, 1, torch.bfloat16, torch.Generator().manual_seed(0))
    find = cudnn_graphs.importlib.util.find_spec
    monkeypatch.setattr(
        cudnn_graphs.importlib.util, "find_spec", lambda n: None if n == "cudnn" else find(n)
    )
    with pytest.raises(UnavailableError, match="is not installed"):
        cudnn_graphs.call(layer, o, "forward")
    monkeypatch.setattr(cudnn_graphs.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "cudnn", None)
    with pytest.raises(UnavailableError, match="nvidia-cudnn-frontend: ModuleNotFoundError"):
        cudnn_graphs.call(layer, o, "forward")
    monkeypatch.setitem(sys.modules, "cudnn", object())
    with pytest.raises(UnavailableError, match="CUDA devices"):
        cudnn_graphs.call(layer, o, "forward")


def test_without_torchvision_the_unfused_network_is_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("torchvision")
    theirs = plain._bare(tiny=False)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    ours = plain._bare(tiny=False)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert type(theirs).__module__ != type(ours).__module__
    with torch.no_grad():
        assert torch.equal(theirs.eval()(x), ours.eval()(x))


def test_a_failure_keeps_what_its_case_is_about() -> None:
    case = Case("name", list, {"kind": "time", "what": "w"})
    row = failed(case, ValueError("first\nsecond"))
    assert (row["kind"], row["what"], row["status"]) == ("time", "w", "failed")
    assert row["reason"] == "ValueError: first"


def test_what_compiles_during_the_build_needs_none() -> None:
    """Modules that say so are imported without the extension; Triton's keep their names."""
    pytest.importorskip("triton")
    benchmarks = ROOT / "benchmarks"
    if not (benchmarks / "gpu_window").is_dir():
        pytest.skip("the package is tested without its repository: no benchmarks/gpu_window")
    folder = ROOT / "fused_resnet" / "bench" / "gpu"
    names = sorted(
        path.stem
        for path in folder.glob("*.py")
        if "Needs no built extension" in path.read_text().split('"""')[1].replace("\n", " ")
    )
    assert {"precompile", "precompile_networks", "cases", "plans", "timing"} <= set(names)
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(benchmarks)!r}]\n"
        "from gpu_window.child import stub_package\n"
        "stub_package()\n"
        + "".join(f"import fused_resnet.bench.gpu.{name}\n" for name in names)
        + "from fused_resnet.backends import triton\n"
        "assert 'fused_resnet._C' not in sys.modules\n"
        "print(triton.conv_bn_add_relu.__module__)\n"
    )
    done = warm_process.run(["-c", code])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "fused_resnet.backends.triton.conv_bn_add_relu"
