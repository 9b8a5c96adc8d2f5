"""What ``explain`` says of a frozen model's programs, against what its modules and PyTorch do."""

from __future__ import annotations

from typing import Any

import torch
from networks import image, randomize
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fused_resnet as fr
from fused_resnet.inference.explain import ExplainedProgram, describe, explain, summary

X = image(2, 3, 64, 64, dtype=torch.float32)


def explained(model: nn.Module, x: torch.Tensor = X) -> list[ExplainedProgram]:
    torch.manual_seed(0)
    return explain(fr.freeze(randomize(model).eval()), x)


def test_each_step_has_the_shape_that_its_module_returns() -> None:
    frozen = fr.freeze(randomize(fr.resnet50(num_classes=5)).eval())
    names = {module: path for path, module in frozen.named_modules()}
    shapes: dict[str, Any] = {}

    def note(module: nn.Module, args: Any, y: Any) -> None:
        shapes[names[module]] = tuple(y.shape)

    handle = nn.modules.module.register_module_forward_hook(note)
    try:
        frozen(X)
    finally:
        handle.remove()
    (program,) = explain(frozen, X)
    convolutions = {s.path: s.result for s in program.steps if s.algorithm}
    assert len(convolutions) == 53
    assert convolutions.pop("conv1") == shapes["maxpool"]
    assert convolutions == {path: shapes[path] for path in convolutions}
    assert program.steps[-1].path == "fc"
    assert program.steps[-1].result == shapes["fc"]


def test_flops_are_those_that_pytorch_counts() -> None:
    model = fr.resnet18(num_classes=5).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad(), fr.use_backend("reference"):
        model(X)
    (program,) = explained(model)
    assert sum(step.flops for step in program.steps) == counter.get_total_flops() > 0


def test_every_program_of_a_call_is_there_in_order() -> None:
    model = randomize(fr.resnet18(num_classes=5)).eval()
    model.layer2.register_forward_hook(lambda module, args, y: y)
    programs = explain(fr.freeze(model), X)
    assert [(p.path, len(p.steps)) for p in programs] == [("", 5), ("layer2", 5), ("", 12)]
    assert [p.steps[0].path for p in programs] == ["conv1", "layer2.0.conv1", "layer3.0.conv1"]
    assert summary(programs).startswith("3 programs of 22 steps, micro-batches of 2 images, ")
    assert explain(nn.ReLU(), X) == []
    assert summary([]) == "0 programs of 0 steps"


def test_steps_are_described() -> None:
    (program,) = explained(fr.cifar_resnet(20))
    told = [describe(step) for step in program.steps]
    assert told[:3] == [
        "3x3 3 to 16, 64x64",
        "3x3 16 to 16, 64x64",
        "3x3 16 to 16, 64x64, residual",
    ]
    assert told.count("zero_pad_shortcut") == 2
    assert told[-2:] == ["global_avg_pool", "linear"]
    assert {step.algorithm for step in program.steps} >= {"direct", ""}


def test_ceil_mode_is_described() -> None:
    conv, bn = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
    pools = nn.MaxPool2d(3, 2, ceil_mode=True), nn.AvgPool2d(2, 1, ceil_mode=True)
    (program,) = explained(nn.Sequential(conv, bn, nn.ReLU(), *pools))
    assert [describe(step) for step in program.steps] == [
        "3x3/2 3 to 8, 64x64",
        "max_pool 3x3/2, ceil_mode",
        "avg_pool 2x2, ceil_mode",
    ]
    assert [step.result for step in program.steps[1:]] == [(2, 8, 16, 16), (2, 8, 15, 15)]
