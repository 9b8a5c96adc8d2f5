"""Backends by name, the reasons of unavailable ones, and the choice as a thread's own state."""

from __future__ import annotations

import pytest
import torch
from cases import batch_norm, normal

import fused_resnet as fr
from fused_resnet import ops, reference

BACKENDS = ("reference", "cpu")


@pytest.mark.parametrize("name", BACKENDS)
def test_each_backend_by_name(name):
    x, bn = normal(2, 8, 5, 5, dtype=torch.float32), batch_norm(8, torch.float32)
    with fr.use_backend(name):
        result = ops.bn_add_relu(x, *bn)
    torch.testing.assert_close(result, reference.bn_add_relu(x, *bn), rtol=1e-5, atol=1e-5)


def test_unavailable_backends_have_a_reason():
    status = fr.backends()
    assert list(status) == ["reference", "cpu", "cuda", "triton", "library"]
    assert status["cpu"]
    assert status["reference"]
    assert status["library"]
    for name in ("cuda", "triton"):
        if status[name]:
            continue
        with pytest.raises(fr.BackendUnavailable, match=name), fr.use_backend(name):
            pass
    with pytest.raises(ValueError, match="nonsense"), fr.use_backend("nonsense"):
        pass


def test_the_choice_is_local_to_a_thread():
    from concurrent.futures import ThreadPoolExecutor

    from fused_resnet.backends.availability import current_backend

    with ThreadPoolExecutor(1) as pool, fr.use_backend("reference"):
        assert pool.submit(current_backend).result() == "auto"
        assert current_backend() == "reference"
    assert current_backend() == "auto"


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_the_convolution_only(backend):
    x, w = normal(2, 8, 6, 6, dtype=torch.float32), normal(8, 8, 3, 3, dtype=torch.float32)
    bn = batch_norm(8, torch.float32)
    with torch.autocast("cpu", torch.bfloat16), fr.use_backend(backend):
        result = ops.conv_bn_add_relu(x, w, *bn, padding=1)
        expected = reference.conv_bn_add_relu(x, w, *bn, padding=1)
    assert result.dtype is expected.dtype is torch.bfloat16
    torch.testing.assert_close(result, expected, rtol=3e-2, atol=3e-2)
