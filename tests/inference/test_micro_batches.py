"""A large batch goes through the early stages of a frozen ResNet in micro-batches."""

from __future__ import annotations

import pytest
import torch
from networks import image, randomize

import fused_resnet as fr
from fused_resnet.inference import micro_batches


@pytest.fixture
def frozen(monkeypatch):
    monkeypatch.setattr(micro_batches, "MAP_BYTES", 1)  # then one image for each thread
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield fr.freeze(randomize(fr.resnet18(num_classes=10)))
    torch.set_num_threads(threads)


def sizes(frozen, monkeypatch, x):
    """The result, and the batches that the first stage saw."""
    seen = []
    stage = type(frozen.layer1)
    forward = stage.forward

    def spy(self, input):
        if self is frozen.layer1:
            seen.append(input.shape[0])
        return forward(self, input)

    with monkeypatch.context() as patch:
        patch.setattr(stage, "forward", spy)
        return frozen(x), seen


def test_micro_batches_have_the_result_of_the_whole_batch(frozen, monkeypatch):
    x = image(5, 3, 64, 64, dtype=torch.float32)
    y, seen = sizes(frozen, monkeypatch, x)
    assert seen == [2, 2, 1]
    singly = torch.cat([frozen(x[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(y, singly, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inside", ["layer2", "layer1.1.conv2"])
def test_a_hook_from_before_sees_the_whole_batch(frozen, inside):
    """The fixture makes micro-batches of two images."""
    model = randomize(fr.resnet18(num_classes=10))
    x, seen = image(5, 3, 64, 64, dtype=torch.float32), []
    hook = model.get_submodule(inside).register_forward_hook
    hook(lambda module, args, y: seen.append(y.shape[0]))
    fr.freeze(model)(x)
    assert seen == [5]


@pytest.mark.parametrize("batch", [0, 1, 2])
def test_a_small_batch_is_one_micro_batch(frozen, monkeypatch, batch):
    y, seen = sizes(frozen, monkeypatch, image(batch, 3, 64, 64, dtype=torch.float32))
    assert seen == [batch]
    assert y.shape == (batch, 10)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
def test_a_scripted_child_is_supported(monkeypatch):
    """Its children and tensors are not in dictionaries."""
    monkeypatch.setattr(micro_batches, "MAP_BYTES", 1)
    model = randomize(fr.resnet18(num_classes=10)).eval()
    x = image(5, 3, 64, 64, dtype=torch.float32)
    expected = fr.freeze(model)(x)
    model.fc = torch.jit.script(model.fc)
    torch.testing.assert_close(fr.freeze(model)(x), expected, rtol=1e-6, atol=1e-6)
