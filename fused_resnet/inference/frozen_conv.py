"""A frozen convolution: a convolution and its batch norm as one module, with its weight packed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from multiprocessing.context import get_spawning_popen
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from .. import ops
from ..backends import reference
from ..backends.availability import is_exporting, resolve_backend
from ..backends.constant import assume_constant_result
from ..backends.folding import fold
from ..nn.module_kinds import PackedConv, eps_of, padding_of
from ..ops.packed import packed_dtype
from ..ops.program_steps import Step, encode
from . import export
from .frozen_module import Frozen

#: The plain weight of a packed one, while a trace or a program refers to it: a module that is
#: called twice becomes one constant.
_PLAIN: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class FrozenConv(Frozen, PackedConv):
    """Packed weight and folded batch norm.

    The convolution's settings have the names of ``nn.Conv2d``.

    Args:
        conv: A fused group's convolution.
        bn: The batch norm after the convolution, with running statistics.
        dtype: Dtype of the feature maps; None for the convolution's own.
        winograd: Whether Winograd's algorithm may run.

    Attributes:
        scale: Scale of each output channel, ``(K,)``, float32 (float64 for float64 maps).
        shift: Shift of each output channel, ``(K,)``, float32 (float64 for float64 maps).
        weight_shape: Shape of the weight that was packed, ``(K, C / groups, kh, kw)``.
    """

    scale: Tensor
    shift: Tensor
    _packed: Tensor

    _is_replica = False  # nn.DataParallel sets it in the copies that it makes

    def __init__(
        self,
        conv: nn.Conv2d,
        bn: Any,
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

    @assume_constant_result
    def plain_weight(self) -> Tensor:
        """:attr:`weight` for an export to store: a real tensor also in a trace, and always one."""
        cached = _PLAIN.get(self.packed)
        plain: Tensor | None = cached() if cached is not None else None
        if plain is None:
            with _disable_current_modes():
                plain = self.weight
            _PLAIN[self.packed] = weakref.ref(plain)
        return plain

    @property
    def weight(self) -> Tensor:
        """The convolution's weight in PyTorch's layout, computed from the packed one."""
        return ops.unpack_conv_weight(self.packed, self.weight_shape, self.groups)  # type: ignore[arg-type]

    @property
    def step(self) -> Step:
        """The convolution and its batch norm as a program of one step."""
        return Step(
            "conv",
            0,
            tensor=0,
            kernel=self.kernel_size,  # type: ignore[arg-type]
            stride=self.stride,  # type: ignore[arg-type]
            padding=self.padding,
            dilation=self.dilation,  # type: ignore[arg-type]
            groups=self.groups,
            out_channels=self.out_channels,
            winograd=self.winograd,
        )

    def forward(self, x: Tensor) -> Tensor:
        """The convolution and its batch norm; the model's own forward adds what follows.

        Args:
            x: Input, ``(N, C, H, W)``.

        Returns:
            ``(N, K, OH, OW)``, channels_last.
        """
        if isinstance(x, Proxy):  # one node of the graph, as one of PyTorch's layers
            return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {})
        geometry: Any = (self.stride, self.padding, self.dilation, self.groups)
        if not is_exporting():
            names = ("stride", "padding", "dilation", "groups")
            return ops.conv_bn_add_relu_packed(
                x,
                self.packed,
                self.scale,
                self.shift,
                weight_shape=self.weight_shape,  # type: ignore[arg-type]
                relu=False,
                winograd=self.winograd,
                **dict(zip(names, geometry, strict=True)),
            )
        tensors = (self.plain_weight(), self.scale, self.shift)
        if resolve_backend("conv_bn_add_relu_packed", x) == "reference":
            return reference.conv_affine_add_relu(x, *tensors, None, *geometry, relu=False)
        return export.run_program(x, tensors, encode([self.step]), [1])[0]

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
