"""The networks of other libraries that the benchmark builds."""

from __future__ import annotations

import pytest
import torch

import fused_resnet as fr
from fused_resnet.bench import problem
from fused_resnet.bench.calibration import last_batch_norms
from fused_resnet.cli import main
from fused_resnet.models import sources


@pytest.mark.parametrize("name", ["resnet50", "hf:microsoft/resnet-50", "timm:resnet50"])
def test_all_sources_give_the_same_architecture(name: str) -> None:
    """Of three libraries: as many parameters, and convolutions of the same shapes."""
    if name.startswith(("hf", "timm")):
        pytest.importorskip({"hf": "transformers", "timm": "timm"}[name.partition(":")[0]])
    model = sources.plain_model(sources.parse(name))
    assert sum(p.numel() for p in model.parameters()) == 25_557_032
    ours = fr.resnet50()
    shapes = [
        sorted(tuple(p.shape) for p in network.parameters() if p.dim() == 4)
        for network in (model, ours)
    ]
    assert shapes[0] == shapes[1]
    assert len(last_batch_norms(model)) == 16
    assert {norm.num_features for norm in last_batch_norms(model)} == {256, 512, 1024, 2048}
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


@pytest.mark.parametrize("depth", [18, 34, 101, 152])
def test_the_hubs_configurations_have_the_papers_sizes(depth: int) -> None:
    pytest.importorskip("transformers")
    model = sources.plain_model(f"hf:microsoft/resnet-{depth}")
    ours = getattr(fr, f"resnet{depth}")()
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in ours.parameters())


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_plain20"])
def test_the_unfused_cifar_network_is_ours(name: str) -> None:
    plain, images = problem.random_problem(name, 2, 32)
    ours = sources.our_model(name, plain.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(
            ours.double()(images.double()), plain.double()(images.double()), rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize(
    "name", ["cifar_plain20", "resnet18", "timm:resnet18", "hf:microsoft/resnet-18"]
)
def test_any_number_of_classes(name: str) -> None:
    """Asked for, or as many as the weights have; the head is where `head_of` says."""
    if name.startswith(("hf", "timm")):
        pytest.importorskip({"hf": "transformers", "timm": "timm"}[name.partition(":")[0]])
    for make in (sources.plain_model, sources.our_model):
        model = make(name, None, 7)
        state = model.state_dict()
        assert state[f"{sources.head_of(name)[0]}.weight"].shape[0] == 7
        assert sources.classes_of(name, state) == 7
        again = make(name, state).state_dict()
        assert all(torch.equal(value, again[key]) for key, value in state.items())


def test_names() -> None:
    assert sources.parse("torchvision:resnet50") == "resnet50"
    assert sources.size_of("cifar_resnet56") == sources.size_of("cifar_plain56") == 32
    for wrong in (
        "resnet51",
        "torchvision:resnet51",
        "hf:resnet-50",
        "nowhere:resnet50",
        "cifar_plain21",
    ):
        with pytest.raises(sources.UnknownNetworkError):
            sources.parse(wrong)


def test_bench_of_another_librarys_network(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    options = "--size=32 --batch=1 --rounds=1 --threads=1 --providers=channels_last,frozen"
    assert main(["bench", "--model-from=timm:resnet18", *options.split()]) == 0
    assert "timm:resnet18" in capsys.readouterr().out
    for wrong in (["bench"], ["bench", "resnet18", "--model-from=timm:resnet18"]):
        assert main([*wrong, *options.split()]) == 2
        assert "expected a model or --model-from" in capsys.readouterr().err
