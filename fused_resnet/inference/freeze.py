"""``freeze``: a copy for inference, batch norm folded and weights packed for this machine.

The copy is the fused model with each group's convolution replaced by a :class:`FrozenConv`, which
holds the group's weight once, in the layout that the kernels read, and runs all of the group. Its
classes derive from the model's own (see :func:`fused_resnet.fuse.derive`), refuse to train, and
ship weights in PyTorch's layout when they are pickled, copied or asked for a ``state_dict``: the
packed layout belongs to one instruction set.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .. import ops
from ..backends.availability import BackendUnavailable
from ..backends.folding import fold
from ..fusion.fuse import derive, fuse
from ..fusion.trace import TracedForward
from ..nn.fused_forward import FusedForward, ResNetForward
from ..nn.groups import Group
from ..nn.module_kinds import FoldedBatchNorm, PackedConv, eps_of, padding_of
from ..ops.checks import DTYPES
from . import export
from .cuda_graphs import Graphs, is_one_tensor, size_for
from .export import packed_dtype
from .frozen_block import FrozenBlock, is_block
from .frozen_row import FrozenRow, is_row
from .parts import in_parts
from .stage_list import StageList, is_stage_list


def freeze(
    model: nn.Module,
    dtype: torch.dtype | None = None,
    *,
    winograd: bool = True,
    graphs: int | bool | None = None,
) -> nn.Module:
    r"""An inference-only copy, in eval mode, with packed weights and folded batch norms.

    Each fused group becomes :math:`y = \max(0, s \cdot (w * x) + t + r)` with
    :math:`s = \gamma / \sqrt{\sigma^2 + \epsilon}` and :math:`t = \beta + s (b - \mu)`, computed in
    float64 and stored in float32 (float64 when that is the dtype). What could not be frozen runs as
    it was. The copy shares nothing with the model: later training does not reach it.

    Packed weights belong to one instruction set, and none of the ways to store the model ships
    them: pickles, state dicts, ``torch.export`` and files that :func:`fused_resnet.load_frozen`
    reads hold weights in PyTorch's layout and pack them where they are loaded. A program made by
    ``torch.export.export(frozen, ...)`` runs wherever this package is imported, and on the same
    instruction set gives the same bits; its weights are packed at its first call.

    Args:
        model: Any module on the CPU or on one CUDA device; :func:`fused_resnet.fuse` is applied
            first. It is not changed.
        dtype: float32, float64, bfloat16 or float16, of the feature maps and of the parameters that
            are left; None keeps the model's own.
        winograd: Whether 3x3 convolutions of stride 1 may run by Winograd's algorithm, in float32
            arithmetic: 2.5 times as fast, at a relative error of about 1e-6 where the direct sum
            has 2e-7. Of bfloat16 and float16 maps, where the result's rounding hides that, too;
            of float64 never.
        graphs: On CUDA, for how many input shapes the model keeps a CUDA graph, recorded at the
            shape's second call; 0 or False for none, and True for 8. A replay runs no Python, so
            None means 8 where all modules are torch's, torchvision's and this package's, else 0.
            ``frozen.cuda_graphs`` is where they are (:class:`fused_resnet.graphs.Graphs`): its
            ``size`` can be changed, ``memory`` tells what each takes, ``reuse_outputs`` saves the
            copy of each result at the price that the next call overwrites it.

    Returns:
        The frozen model. It takes floating-point inputs of its own dtype or float32, computes in
        its own, in channels_last, and answers in the dtype of the input, without a gradient.
        ``train()``, ``requires_grad_()`` and conversions raise.

    Raises:
        TypeError: ``model`` is not a module; ``dtype`` is not one of these.
        ValueError: ``model`` is already frozen.
        BackendUnavailable: A parameter is on another kind of device, or not where the others are.
    """
    if dtype is not None and dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"freeze: dtype: expected one of ({names}) or None, got {dtype}")
    frozen = fuse(model).eval()
    _check_device(frozen)
    own = dtype or next((p.dtype for p in frozen.parameters() if p.is_floating_point()), None)
    with torch.no_grad():
        for module in list(frozen.modules()):
            if isinstance(module, FusedForward):
                _freeze_groups(module, dtype, winograd)
        _own_tensors(frozen, dtype)
    for module in frozen.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            module.__class__ = derive(type(module), _mixin(module))
    if not isinstance(frozen, torch.jit.ScriptModule):
        frozen.__class__ = derive(type(frozen), FrozenRoot)
        frozen.frozen_dtype = own or torch.float32  # type: ignore[assignment]
        frozen.cuda_graphs = Graphs(size_for(frozen, graphs))  # type: ignore[assignment]
    return frozen


class Frozen(nn.Module):
    """Mixed into every module of a frozen model: what it refuses."""

    fused_resnet_prefix = "Frozen"

    def train(self, mode: bool = True) -> Frozen:
        """Only ``train(False)``, which is ``eval()``."""
        if mode:
            raise RuntimeError(_refusal("train()"))
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Frozen:
        """Only ``requires_grad_(False)``."""
        if requires_grad:
            raise RuntimeError(_refusal("requires_grad_()"))
        return super().requires_grad_(False)

    def __getstate__(self) -> dict[str, Any]:
        # Without what was decided about the modules, which holds on to them.
        return {k: v for k, v in self.__dict__.items() if k != "_held"}

    def _replicate_for_data_parallel(self) -> Frozen:
        # As above: what was decided holds the weights of the module that is copied.
        replica: Frozen = super()._replicate_for_data_parallel()
        replica.__dict__.pop("_held", None)
        return replica

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Frozen:
        # Asked before the first tensor is converted, so a refusal leaves the model whole.
        packed = (module.packed for module in self.modules() if isinstance(module, FrozenConv))
        for dtype, device in {
            (t.dtype, t.device) for t in chain(self.parameters(), self.buffers(), packed)
        }:
            probe = fn(torch.empty(0, dtype=dtype, device=device))
            if probe.dtype != dtype or probe.device != device:
                raise RuntimeError(_refusal(f"conversion to {probe.dtype} on {probe.device}"))
        return super()._apply(fn, recurse)


def _mixin(module: nn.Module) -> type[Frozen]:
    if isinstance(module, ResNetForward):
        return FrozenResNet
    if is_stage_list(module):
        return FrozenStages
    if isinstance(module, TracedForward) and module.early_members():
        return FrozenTraced
    if is_block(module):
        return FrozenResidual
    return FrozenSequence if is_row(module) else Frozen


def _refusal(what: str) -> str:
    return f"{what}: this model is frozen for inference; use the model that freeze() was given"


class FrozenRoot(Frozen):
    """Mixed into the outermost module: dtype and memory format of what comes in and goes out."""

    frozen_dtype: torch.dtype
    cuda_graphs: Graphs

    @classmethod
    def fused_resnet_members(cls, base: type[nn.Module]) -> dict[str, Any]:
        """A forward with the signature of the base's, which exporters read."""

        def forward(self: FrozenRoot, *args: Any, **kwargs: Any) -> Any:
            return FrozenRoot.forward(self, *args, **kwargs)

        forward.__doc__ = base.forward.__doc__
        forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
        return {"forward": forward}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward between two conversions."""
        # Going through structures takes ten times as long as looking at one tensor.
        leaves = args if is_one_tensor(args, kwargs) else tree_leaves((args, kwargs))
        given = self._given_dtype(leaves)
        with torch.no_grad():
            result = self.cuda_graphs.run(self, super().forward, args, kwargs, self._enter)
            if given is None or given is self.frozen_dtype:
                return result
            return tree_map(lambda leaf: leaf.to(given) if _is_map(leaf) else leaf, result)

    def _given_dtype(self, leaves: Iterable[Any]) -> torch.dtype | None:
        given = None
        for leaf in leaves:
            if not _is_map(leaf):
                continue
            if leaf.dtype not in (self.frozen_dtype, torch.float32):
                wanted = dict.fromkeys((str(self.frozen_dtype), "torch.float32"))
                raise TypeError(
                    f"{type(self).__name__}: input: expected dtype {' or '.join(wanted)}, "
                    f"got {leaf.dtype}"
                )
            given = given or leaf.dtype
        return given

    def _enter(self, leaf: Any) -> Any:
        if not _is_map(leaf):
            return leaf
        if leaf.dim() == 4:
            return leaf.to(self.frozen_dtype, memory_format=torch.channels_last)
        return leaf.to(self.frozen_dtype)


def _is_map(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


class FrozenResNet(Frozen):
    """Mixed into a ResNet: a large batch goes through the early stages in parts."""

    def _early_stages(self, x: Tensor) -> Tensor:
        return in_parts(self, super()._early_stages, x, self._early_members)  # type: ignore[misc]

    def _early_members(self) -> list[nn.Module]:
        m: Any = self
        return [m.conv1, m.bn1, m.relu, m.maxpool, m.layer1, m.layer2]


class FrozenTraced(Frozen):
    """Mixed into a traced module that calls stages: as :class:`FrozenResNet`."""

    def run_early(self, stages: Callable[[nn.Module, Tensor], Tensor], x: Tensor) -> Tensor:
        """See :meth:`fused_resnet.swap.TracedForward.run_early`."""
        m: Any = self
        return in_parts(self, partial(stages, self), x, m.early_members)


class FrozenStages(StageList, Frozen):
    """Mixed into a list of stages of transformers: as :class:`FrozenResNet`."""


class FrozenResidual(FrozenBlock, Frozen):
    """Mixed into a residual block: it is one operation."""


class FrozenSequence(FrozenRow, Frozen):
    """Mixed into a sequence of residual blocks: their operations, one after another."""


class FrozenConv(Frozen, PackedConv):
    """A whole group: packed weight, folded batch norm, and whether ReLU and max-pool follow.

    Settings of the convolution keep the names that ``nn.Conv2d`` gives them.

    Args:
        conv: The group's convolution.
        bn: Its batch norm, with running statistics.
        pool: Its max-pool, if it has one.
        group: The operation, whether ReLU is part of it, and how long it is.
        dtype: Of the feature maps; None for the convolution's own.
        winograd: Whether Winograd's algorithm may run.
    """

    scale: Tensor
    shift: Tensor
    _packed: dict[str, Tensor]

    _is_replica = False  # nn.DataParallel sets it in the copies that it makes

    def __init__(
        self,
        conv: nn.Conv2d,
        bn: Any,
        pool: nn.MaxPool2d | None,
        group: Group,
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
        self.operation, self.relu, self.span = group.operation, group.relu, group.length
        self.pool: dict[str, Any] | None = None
        if pool is not None:
            self.pool = {
                "pool_kernel": pool.kernel_size,
                "pool_stride": pool.stride,
                "pool_padding": pool.padding,
            }
        # What every call passes on, made once.
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
        # No buffer, which an exporter would ship; and one dictionary for good, so that a Snapshot
        # sees what is in it.
        self.__dict__.setdefault("_packed", {})["weight"] = ops.pack_conv_weight(
            weight, self.groups
        )

    @property
    def packed(self) -> Tensor:
        """The weight as the kernels read it."""
        packed = self._packed["weight"]
        return packed.to(self.scale.device) if self._is_replica else packed

    @property
    def operand(self) -> Tensor:
        """What an operation is given: the packed weight, or the plain one for an exporter."""
        return self._plain_weight() if export.is_exporting() else self.packed

    @torch.compiler.assume_constant_result
    def _plain_weight(self) -> Tensor:
        # A method, as the compiler of torch 2.11 takes no module as such a function's argument.
        return export.plain_weight(self)

    @property
    def weight(self) -> Tensor:
        """The convolution's weight in PyTorch's layout, computed from the packed one."""
        return ops.unpack_conv_weight(self.packed, self.weight_shape, self.groups)  # type: ignore[arg-type]

    def forward(
        self, x: Tensor, residual: Tensor | None = None, relu: bool = False, pool: bool = False
    ) -> Tensor:
        """``(N, C, H, W)``, and a residual like the result, to the result, channels_last.

        Called alone it is the convolution and its batch norm, so that a forward which runs as it
        was adds what follows them; ``relu`` and ``pool`` (with ReLU) ask for more of the group.
        """
        weight, scale, shift = self.operand, self.scale, self.shift
        made_of = export if export.is_exporting() else ops
        if pool and self.pool is not None:
            stem = made_of.conv_bn_relu_maxpool_packed
            return stem(x, weight, scale, shift, **self.pool, **self._geometry)
        return made_of.conv_bn_add_relu_packed(
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
        """The group's settings."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, "
            f"groups={self.groups}, relu={self.relu}, operation={self.operation}"
        )

    # The packed layout never leaves the process.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Frozen:
        super()._apply(fn, recurse)
        self._packed["weight"] = fn(self._packed["weight"])
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_packed"]
        return {**state, "weight": self.weight}

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


def _freeze_groups(owner: FusedForward, dtype: torch.dtype | None, winograd: bool) -> None:
    for group in owner.fused_groups():
        if not group.operation or not group.conv or not group.foldable:
            continue
        conv, bn = owner.get_submodule(group.conv), owner.get_submodule(group.bn)
        if isinstance(conv, PackedConv) or bn.running_mean is None:
            continue  # of the batch's own statistics there is nothing to fold
        pool = owner.get_submodule(group.pool) if group.pool else None
        assert isinstance(conv, nn.Conv2d)
        frozen = FrozenConv(conv, bn, pool, group, dtype, winograd)  # type: ignore[arg-type]
        folded = FoldedBatchNorm()
        for name, child in bn.named_children():
            folded.add_module(name, child)
        owner.set_submodule(group.conv, frozen)
        owner.set_submodule(group.bn, folded)


def _check_device(model: nn.Module) -> None:
    first: torch.device | None = None
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        first = first or tensor.device
        if tensor.device.type not in ("cpu", "cuda") or tensor.device != first:
            raise BackendUnavailable(
                f"freeze: weights are packed for the CPU or for one CUDA device, and {name} is on "
                f"{tensor.device}; move the model to one of them first"
            )


def _own_tensors(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Replace every parameter and buffer that is left by a copy, once for each, in the dtype."""
    copies: dict[int, Tensor] = {}
    for module in model.modules():
        if isinstance(module, FrozenConv):
            continue
        # Half-precision statistics would lose what PyTorch keeps: batch norm takes mixed dtypes.
        keep = isinstance(module, nn.modules.batchnorm._NormBase) and dtype in (
            torch.bfloat16,
            torch.float16,
        )
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in copies:
                    cast = dtype is not None and tensor.is_floating_point() and not keep
                    own = tensor.detach().clone().to(dtype if cast else tensor.dtype)
                    copies[id(tensor)] = (
                        nn.Parameter(own, requires_grad=False)
                        if isinstance(tensor, nn.Parameter)
                        else own
                    )
                held[name] = copies[id(tensor)]  # type: ignore[assignment]
