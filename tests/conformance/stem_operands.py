"""Operands of the stem (convolution, batch norm, ReLU, max-pool) and its check with float64."""

from __future__ import annotations

from cases import FORMATS, Conv, batch_norm, conv_weight, normal
from precisions import FLOAT32, TF32, Precision, tensor_core_depth
from shapes import geometry, window
from torch._prims_common import suggest_memory_format

from fused_resnet import reference
from fused_resnet.backends.activation import ActivationLike

EPS = 1e-5
KERNEL = "conv_bn_relu_maxpool_kernel"


class Operands:
    """Of one stem, on the CPU."""

    def __init__(
        self,
        case: Conv,
        precision: Precision,
        *,
        fmt: str = "channels_last",
        bias: bool = True,
        affine: bool = True,
    ) -> None:
        dtype = precision.dtype
        self.case, self.precision = case, precision
        self.x = normal(*case.x, dtype=dtype).contiguous(memory_format=FORMATS[fmt])
        self.weight = conv_weight(case, dtype)
        self.bn = batch_norm(case.k, dtype)
        if not affine:
            self.bn = (None, None, *self.bn[2:])
        self.bias = normal(case.k, dtype=dtype) if bias else None

    def run(self, backend, *, x=None, **options):
        """``options`` are the pool's, and those that a backend's own operator has besides."""
        pool = {name: options.pop(name) for name in list(options) if name.startswith("pool_")}
        x = self.x if x is None else x
        place = (*geometry(self.case), EPS, *window(pool))
        with self.precision.set():
            return backend.ops.conv_bn_relu_maxpool(
                x, self.weight, self.bias, *self.bn, *place, **options
            )

    def eager_and_truth(self, pool: dict, activation: ActivationLike = None):
        def run(x, weight, bn, bias):
            geometry = {"stride": 1, "padding": 0, **self.case.args, **pool}
            return reference.conv_bn_relu_maxpool(
                x, weight, *bn, conv_bias=bias, activation=activation, **geometry
            )

        wide = [None if t is None else t.double() for t in (*self.bn, self.bias)]
        operand = self.precision.operand
        truth = run(operand(self.x), operand(self.weight), wide[:4], wide[4])
        return run(self.x, self.weight, self.bn, self.bias), truth


def check(
    backend, case: Conv, precision: Precision, *, fused: bool = True, pool: dict | None = None,
    config=None, **operands,
) -> None:  # fmt: skip
    """Compare with float64; on a GPU also whether it was the stem's own kernel that ran, once."""
    pool = pool or {}
    stem = Operands(case, precision, **operands)
    backend.launches()
    result = stem.run(backend, **pool, **({} if config is None else {"config": config}))
    names = [launch.kernel for launch in backend.launches()]
    depth = tensor_core_depth(backend, stem.weight)
    precision.check(result, *stem.eager_and_truth(pool), depth)
    # A single channel is the same memory in both formats, and PyTorch calls it contiguous.
    assert result.is_contiguous(memory_format=suggest_memory_format(stem.x))
    if getattr(backend, "name", "") != "cpu":
        assert len([name for name in names if KERNEL in name]) == fused


def one_kernel(backend, case: Conv, precision: Precision) -> bool:
    """Whether a backend has a kernel for the whole stem."""
    if backend.name == "interpreter":
        return True
    # CUDA's is for tensor cores, and in tf32 the filters of a deep stem would fill shared memory.
    return precision is not FLOAT32 and not (precision is TF32 and case.why == "deep-stem")
