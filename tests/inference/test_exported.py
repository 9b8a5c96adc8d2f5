"""``torch.export`` of a frozen model: the same answers in another process and on another ISA."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import warm_process
from networks import image, randomize
from torch import nn

import fused_resnet as fr
from fused_resnet.inference import export as exported
from fused_resnet.inference.frozen_conv import FrozenConv
from fused_resnet.inference.run_steps import run_steps
from fused_resnet.ops.program_steps import decode

F32 = torch.float32


def network() -> nn.Module:
    """A stem with its pool, basic blocks with and without projections."""
    torch.manual_seed(0)
    return randomize(fr.resnet18(num_classes=10)).eval()


def program_of(
    frozen: nn.Module, x: torch.Tensor, strict: bool = False
) -> torch.export.ExportedProgram:
    """For any batch, by the name of the argument of the model's own forward."""
    batch = torch.export.Dim("batch", min=1, max=16)
    with torch.no_grad():
        return torch.export.export(frozen, (x,), dynamic_shapes={"x": {0: batch}}, strict=strict)


#: What the other process does: the program's answer to the images beside it.
SERVE = """
import sys, torch, fused_resnet as fr
folder, isa = sys.argv[1:]
assert fr.build_info()["isa"] == isa
module = torch.export.load(folder + "/program.pt2").module()
images = torch.load(folder + "/images.pt")
with torch.inference_mode():
    torch.save([module(x).clone() for x in images for _ in range(2)], folder + "/answers.pt")
"""


class Saved(NamedTuple):
    """An exported program and its images in a folder, and the models that it comes from."""

    folder: Path
    images: list[torch.Tensor]
    frozen: nn.Module
    model: nn.Module
    dtype: torch.dtype


@pytest.fixture(
    scope="module", params=[F32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Made once for all instruction sets."""
    folder, model, dtype = tmp_path_factory.mktemp("exported"), network(), request.param
    frozen = fr.freeze(model, dtype)
    images = [image(n, 3, 48, 40, dtype=F32, seed=n) for n in (2, 1, 3)]
    torch.export.save(program_of(frozen, images[0]), folder / "program.pt2")
    torch.save(images, folder / "images.pt")
    return Saved(folder, images, frozen, model.double(), dtype)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_bf16", "amx"])
def test_another_process_has_the_same_results(saved: Saved, isa: str) -> None:
    """The same bits on this process's instruction set; within the usual error on another one."""
    if isa not in fr.build_info()["isa_supported"]:
        pytest.skip(f"this machine or build has no {isa} kernels")
    folder, images, frozen, truth, dtype = saved
    environment = os.environ | {"FUSED_RESNET_ISA": isa}
    warm_process.run(["-c", SERVE, str(folder), isa], check=True, env=environment)
    answers = torch.load(folder / "answers.pt")
    with torch.no_grad():
        for i, x in enumerate(images):
            exact = truth(x.double())
            for answer in answers[2 * i : 2 * i + 2]:
                if isa == fr.build_info()["isa"]:
                    assert torch.equal(answer, frozen(x))
                limit = 1e-5 if dtype is F32 else 3e-2
                assert (answer - exact).norm() < limit * exact.norm()
            assert torch.equal(*answers[2 * i : 2 * i + 2])


# How the program is traced does not depend on the dtype: each of both.
@pytest.mark.parametrize(
    ("dtype", "strict"), [(None, False), (torch.bfloat16, True), (torch.float64, False)], ids=str
)
def test_a_program_stores_plain_weights_once(dtype: torch.dtype | None, strict: bool) -> None:
    model, x = network(), image(2, 3, 48, 40, dtype=F32)
    frozen = fr.freeze(model, dtype)
    program = program_of(frozen, x, strict)
    operators = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert operators.count("fused_resnet_export.run_program.default") == 1
    assert not any("fused_resnet." in name for name in operators)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    held = list(program.constants.values())
    assert sorted(tuple(t.shape) for t in held) == sorted(tuple(c.weight.shape) for c in convs)
    assert not any("packed" in name for name in (*program.state_dict, *program.constants))
    for batch in (2, 5):
        x = image(batch, 3, 48, 40, dtype=F32)
        assert torch.equal(program.module()(x), frozen(x))


def test_single_convolutions_functions_and_keywords() -> None:
    """Groups outside blocks, in a model that is part of a larger one and has a second argument."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1, groups=1)
            self.bn = nn.BatchNorm2d(8)
            self.again = nn.Conv2d(8, 8, 3, 2, 1, 1, 4, bias=False)
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
            h = torch.relu(self.bn(self.conv(x)))
            return torch.relu(self.norm(self.again(h))) * scale

    class Larger(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x, scale=2.0) + self.inner(x)

    torch.manual_seed(0)
    model = Larger(randomize(Head()).eval())
    x = image(2, 3, 9, 10, dtype=F32)
    expected = model(x).detach()
    model.inner = fr.freeze(model.inner)
    assert sum(isinstance(m, FrozenConv) for m in model.modules()) == 2
    with torch.no_grad():
        program = torch.export.export(model, (x,))
    # A module that is called twice is one constant.
    assert len(program.constants) == 2
    assert torch.equal(program.module()(x), model(x))
    torch.testing.assert_close(program.module()(x), expected, rtol=1e-5, atol=1e-5)


def test_the_reference_backend_exports_pytorchs_own_operators() -> None:
    frozen, x = fr.freeze(network()), image(2, 3, 48, 40, dtype=F32)
    with fr.use_backend("reference"):
        program = program_of(frozen, x)
    assert not any("fused_resnet" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), frozen(x), rtol=1e-4, atol=1e-4)


def test_exporting_leaves_the_model_as_it_was() -> None:
    frozen, x = fr.freeze(network()), image(2, 3, 48, 40, dtype=F32)
    before, layouts = frozen(x), [m.packed for m in frozen.modules() if isinstance(m, FrozenConv)]
    program_of(frozen, x)
    assert all(
        m.packed is p
        for m, p in zip(
            (m for m in frozen.modules() if isinstance(m, FrozenConv)), layouts, strict=True
        )
    )
    assert torch.equal(frozen(x), before)


def test_weights_are_packed_once_and_again_when_they_change() -> None:
    weight = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    first = exported.packed(weight, F32, 1)
    assert exported.packed(weight, F32, 1) is first
    weight.mul_(2)
    assert torch.equal(exported.packed(weight, F32, 1), fr.ops.pack_conv_weight(weight))
    grouped = exported.packed(weight, F32, 2)
    assert torch.equal(grouped, fr.ops.pack_conv_weight(weight, 2))
    held = len(exported._PACKED)
    del weight
    assert len(exported._PACKED) == held - 1


def test_weights_that_cannot_tell_a_change_are_packed_at_every_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exported, "_warned", False)
    with torch.inference_mode():
        weight = torch.ones(8, 4, 3, 3)
        with pytest.warns(UserWarning, match="loaded under torch.inference_mode"):
            exported.packed(weight, F32, 1)
        weight.mul_(2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = exported.packed(weight, F32, 1)
        assert torch.equal(again, fr.ops.pack_conv_weight(weight))


def stored(frozen: nn.Module, x: torch.Tensor) -> tuple[Any, ...]:
    """The arguments of the operator that an export of the network records."""
    (program,) = frozen._frozen_programs
    return x, program.tensors(plain=True), program.numbers, list(program.outputs)


def test_the_operator_by_pytorchs_own_checks() -> None:
    """Schema, fake and dispatch."""
    x = image(2, 3, 48, 40, dtype=F32).contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(
        torch.ops.fused_resnet_export.run_program.default,
        stored(fr.freeze(network()), x),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_a_stored_program_runs_on_every_backend() -> None:
    """Step by step, with whole blocks where the backend has them."""
    frozen, x = fr.freeze(network(), winograd=False), image(2, 3, 48, 40, dtype=F32)
    expected = frozen(x)
    x, tensors, numbers, outputs = stored(frozen, x)
    with fr.use_backend("reference"):
        (result,) = exported.run_program(x, tensors, numbers, outputs)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    program = exported._StoredProgram(
        decode(numbers), outputs, frozen._frozen_programs[0].tensors()
    )
    assert len({block.last for block in program.blocks.values()}) == 8
    x = x.contiguous(memory_format=torch.channels_last)
    for known in (None, {}):
        (result,) = run_steps(program, x, "cpu", known)
        assert torch.equal(result, expected)


class Twice(nn.Module):
    """A frozen network between other layers, called two times: its weights are shared."""

    def __init__(self, frozen: nn.Module) -> None:
        super().__init__()
        self.frozen = frozen

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.frozen(x) + self.frozen(2 * x).relu()
        return result


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
def test_a_packed_program_has_the_same_bits(dtype: torch.dtype) -> None:
    """And calls the operators' library alone."""
    model = Twice(fr.freeze(network(), dtype))
    images = [image(n, 3, 48, 40, dtype=F32, seed=n) for n in (2, 1, 3)]
    program = fr.pack_exported(program_of(model, images[0]))
    called = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert "fused_resnet.run_program.default" in called
    assert not {name for name in called if "fused_resnet_export" in name}
    for x in images:
        assert torch.equal(program.module()(x), model(x))


def test_packing_twice_changes_nothing() -> None:
    frozen, x = fr.freeze(network()), image(2, 3, 48, 40, dtype=F32)
    program = fr.pack_exported(program_of(frozen, x))
    assert fr.pack_exported(program) is program
    assert torch.equal(program.module()(x), frozen(x))
