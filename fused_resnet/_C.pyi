"""The compiled extension: loads every operator into ``torch.ops.fused_resnet``."""

from collections.abc import Callable
from typing import Any

import torch

def build_info() -> dict[str, Any]: ...
def schemas() -> list[str]: ...
def cuda_device_problem(device: int) -> str: ...
def packed_conv_weight_numel(weight_shape: list[int], groups: int, dtype: torch.dtype) -> int: ...
def packed_conv_weight_dtype(dtype: torch.dtype) -> torch.dtype: ...
def conv_algorithm(
    input_shape: list[int],
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    dtype: torch.dtype,
    winograd: bool,
) -> str: ...
def peak_flops(dtype: torch.dtype) -> float: ...
def memory_bandwidth() -> dict[str, float]: ...
def release_results() -> None: ...
def kept_result_bytes() -> int: ...
def program_report(
    tensors: list[torch.Tensor],
    steps: list[int],
    outputs: list[int],
    sizes: list[int],
    dtype: torch.dtype,
) -> list[tuple[list[int], str, int]]: ...

class Program:
    def __init__(
        self, tensors: list[torch.Tensor], steps: list[int], outputs: list[int]
    ) -> None: ...
    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]: ...

# The operators of torch.ops.fused_resnet, without the checks of fused_resnet.ops.checks.
bn_add_relu: Callable[..., Any]
bn_add_relu_backward: Callable[..., Any]
conv_bn_add_relu: Callable[..., Any]
conv_bn_relu_maxpool: Callable[..., Any]
pack_conv_weight: Callable[..., Any]
unpack_conv_weight: Callable[..., Any]
conv_bn_add_relu_packed: Callable[..., Any]
conv_bn_relu_maxpool_packed: Callable[..., Any]
bn_add_relu_apply: Callable[..., Any]
conv_statistics: Callable[..., Any]
conv_bn_add_relu_planned: Callable[..., Any]
conv_conv_add_relu_packed: Callable[..., Any]
residual_block: Callable[..., Any]
run_program: Callable[..., Any]
conv_forward: Callable[..., Any]
conv_backward: Callable[..., Any]
block_end: Callable[..., Any]
block_end_backward: Callable[..., Any]
bn_coefficients: Callable[..., Any]
bn_update_running: Callable[..., Any]
bn_backward_coefficients: Callable[..., Any]
stem_end: Callable[..., Any]
stem_end_backward: Callable[..., Any]
