"""A frozen convolution: a convolution and its batch norm as one module, with its weight packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from multiprocessing.context import get_spawning_popen
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from .. import ops
from ..backends.constant import assume_constant_result
from ..backends.folding import fold
from ..nn.module_kinds import PackedConv, eps_of, padding_of
from . import export
from .export import packed_dtype
from .frozen_module import Frozen


class FrozenConv(Frozen, PackedConv):
    """Packed weight and folded batch norm; runs the ReLU and the max-pool behind it on request.

    The convolution's settings have the names of ``nn.Conv2d``.

    Args:
        conv: A fused group's convolution.
        bn: Its batch norm, with running statistics.
        pool: Its max-pool, or None.
        dtype: Of the feature maps; None for the convolution's own.
        winograd: Whether Winograd's algorithm may run.
    """

    scale: Tensor
    shift: Tensor
    _packed: Tensor

    _is_replica = False  # nn.DataParallel sets it in the copies that it makes

    def __init__(
        self,
        conv: nn.Conv2d,
        bn: Any,
        pool: nn.MaxPool2d | None,
        dtype: torch.dtype | None,
        winograd: bool,
    ) -> None:
        super().__init__()
        self.dtype = dtype or conv.weight.dtype
        wide = torch.float64 if self.dtype is torch.float64 else torch.float32
        self.winograd = winograd and self.dtype is not torch.float64
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size, self.groups = conv.kernel_size, conv.groups
        self.weight_shape: tuple[int, ...] = tuple(conv.weight.shape)
        self.stride, self.dilation = conv.stride, conv.dilation
        self.padding = padding_of(conv) or (0, 0)
        self.pool: dict[str, Any] | None = None
        if pool is not None:
            self.pool = {
                "pool_kernel": pool.kernel_size,
                "pool_stride": pool.stride,
                "pool_padding": pool.padding,
            }
        # Arguments of every call.
        self._geometry: dict[str, Any] = {
            "weight_shape": self.weight_shape,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }
        scale, shift = fold(
            conv.bias,
            bn.weight,
            bn.bias,
            bn.running_mean,
            bn.running_var,
            eps_of(bn),
            torch.float64,
        )
        self._set_weight(conv.weight)
        self.register_buffer("scale", scale.to(wide))
        self.register_buffer("shift", shift.to(wide))
        self.training = False

    def _set_weight(self, weight: Tensor) -> None:
        weight = weight.to(packed_dtype(self.dtype, weight.device))
        # Not a buffer, which an exporter would store.
        self.__dict__["_packed"] = ops.pack_conv_weight(weight, self.groups)
        self.changed()

    @property
    def packed(self) -> Tensor:
        """The packed weight."""
        return self._packed.to(self.scale.device) if self._is_replica else self._packed

    @property
    def operand(self) -> Tensor:
        """The operation's weight argument: packed, or in PyTorch's layout while exporting."""
        return self._plain_weight() if export.is_exporting() else self.packed

    @assume_constant_result
    def _plain_weight(self) -> Tensor:
        # A method: the compiler of torch 2.11 takes no module as the argument of such a function.
        return export.plain_weight(self)

    @property
    def weight(self) -> Tensor:
        """The convolution's weight in PyTorch's layout, computed from the packed one."""
        return ops.unpack_conv_weight(self.packed, self.weight_shape, self.groups)  # type: ignore[arg-type]

    def forward(
        self, x: Tensor, residual: Tensor | None = None, relu: bool = False, pool: bool = False
    ) -> Tensor:
        """The convolution and its batch norm, and on request the rest of the group.

        By default it stops there: the model's own forward adds what follows.

        Args:
            x: ``(N, C, H, W)``.
            residual: Added before the ReLU, in the result's shape and dtype; None for none.
            relu: Apply the ReLU.
            pool: Apply the ReLU and the group's max-pool.

        Returns:
            ``(N, K, OH, OW)``, channels_last.
        """
        if isinstance(x, Proxy):  # one node of the graph, as one of PyTorch's layers
            given = (x, residual, relu, pool)
            path = x.tracer.path_of_module(self)
            return x.tracer.create_proxy("call_module", path, given, {})
        weight, scale, shift = self.operand, self.scale, self.shift
        functions = export if export.is_exporting() else ops
        if pool and self.pool is not None:
            stem = functions.conv_bn_relu_maxpool_packed
            return stem(x, weight, scale, shift, **self.pool, **self._geometry)
        return functions.conv_bn_add_relu_packed(
            x,
            weight,
            scale,
            shift,
            residual,
            relu=relu,
            winograd=self.winograd,
            **self._geometry,
        )

    def extra_repr(self) -> str:
        """The convolution's settings for ``repr``."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, "
            f"groups={self.groups}"
        )

    # The packed layout never leaves the process.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Frozen:
        super()._apply(fn, recurse)
        self.__dict__["_packed"] = fn(self._packed)
        self.changed()
        return self

    def __getstate__(self) -> dict[str, Any]:
        state, weight = super().__getstate__(), self.weight
        del state["_packed"]
        starting = get_spawning_popen()
        if starting is not None:
            # The process that starts takes over the weight's memory after this call.
            starting.__dict__.setdefault("_fused_resnet_weights", []).append(weight)
        return {**state, "weight": weight}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        weight = state.pop("weight")
        super().__setstate__(state)
        self._set_weight(weight)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        for name, value in (("weight", self.weight), ("scale", self.scale), ("shift", self.shift)):
            destination[prefix + name] = value

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        shapes = {
            "weight": self.weight_shape,
            "scale": tuple(self.scale.shape),
            "shift": tuple(self.shift.shape),
        }
        for name, shape in shapes.items():
            value = state_dict.get(prefix + name)
            if value is None:
                missing_keys.append(prefix + name)
            elif tuple(value.shape) != shape:
                error_msgs.append(
                    f"size mismatch for {prefix}{name}: expected {shape}, got {tuple(value.shape)}"
                )
            elif name == "weight":
                self._set_weight(value.to(self.scale.device))
            else:
                getattr(self, name).copy_(value)
        if strict:
            known = {prefix + name for name in shapes}
            unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k not in known]
