"""``freeze``: a copy for inference, batch norm folded and weights packed for this machine.

In the copy each fused group's convolution is a :class:`FrozenConv`, which stores the group's weight
once, in the layout that the kernels read. Its classes derive from the model's own
(:func:`fused_resnet.fusion.fuse.derive`) and refuse to train.
Pickles, copies and state dicts have the weights in PyTorch's layout: the packed layout belongs to
one instruction set.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor, nn

from ..backends.availability import BackendUnavailable
from ..fusion.fuse import derive, expect_trainable, fuse
from ..fusion.report import groups_of
from ..nn.fused_forward import FusedForward
from ..nn.groups import Group
from ..nn.module_kinds import FoldedBatchNorm, PackedConv, original_class
from ..ops.checks import DTYPES
from .cuda_graphs import Graphs, size_for
from .frozen_conv import FrozenConv
from .frozen_module import Derived, Frozen
from .frozen_root import FrozenRoot
from .lowered import Lowered, add_plans


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
    float64 and stored in float32 (float64 when that is the dtype). Other modules run unchanged. The
    copy shares nothing with the model: later training does not change it.

    Packed weights belong to one instruction set and are never stored: pickles, state dicts,
    ``torch.export`` and files that :func:`fused_resnet.load_frozen` reads have weights in PyTorch's
    layout and pack them at loading. A program made by ``torch.export.export(frozen, ...)`` runs
    wherever this package is imported, and on the same instruction set gives the same bits; its
    weights are packed at its first call.

    Winograd's algorithm computes tiles of 4x4 or 2x2 results from windows of 6x6 or 4x4 inputs, and
    its error is relative to the largest value of the window, not to the inputs of one result: with
    the filters :math:`w` and the batch norm's scale :math:`s`,
    :math:`|\hat y - y| \le 2 \cdot 10^{-6} \sum |s w| \max_{window} |x|` in float32. So one value
    of 1e4 among values of 1 gives an error of 1e-3 at results of its tiles that it does not reach.
    A NaN or an infinity makes the tiles that read it NaN, at most 8x8 results where a direct sum
    has 3x3; and :math:`\sum |s w| \max |x|` above 1e33 may overflow where a direct sum is finite.
    Images never mix. ``winograd=False`` has none of this.

    The same batch gives the same bits, whatever ran before and on however many threads. An image
    alone and the same image in a batch may run by different algorithms: logits differ by up to 2e-6
    in float32 and 1e-2 in bfloat16, relative to their norm. With ``winograd=False`` they have the
    same bits.

    Args:
        model: Any module on the CPU or on one CUDA device; :func:`fused_resnet.fuse` is applied
            first. It is not changed.
        dtype: float32, float64, bfloat16 or float16, of the feature maps and of the parameters of
            modules that are not fused; None keeps the model's own.
        winograd: Whether 3x3 convolutions of stride 1 may run by Winograd's algorithm, in float32
            arithmetic: 2.5 times as fast, at a relative error of about 1e-6 where the direct sum
            has 2e-7. It also runs on bfloat16 and float16 maps, where the result's rounding is
            larger than that error, and never on float64 maps. Its bounds are above.
        graphs: Number of input shapes for which the model keeps a CUDA graph, captured at the
            shape's second call; 0 or False for none, True for 8. A replay runs no Python, so None
            means 8 if all modules are torch's, torchvision's and this package's, else 0.
            ``frozen.cuda_graphs`` (:class:`fused_resnet.inference.cuda_graphs.Graphs`) owns them:
            ``size`` can be changed, ``memory`` lists the bytes of each, and ``reuse_outputs``
            saves the copy of each result, which the next call then overwrites.

    Returns:
        The frozen model. It takes floating-point inputs of its own dtype or float32, computes in
        its own, in channels_last, and returns the dtype of the input, without a gradient. One
        without floating-point parameters computes in the dtype of its input. It is immutable:
        ``train()``, ``requires_grad_()``, conversions, hooks on its inner modules and every other
        change inside it raise a RuntimeError that says what to do instead. Hooks on the frozen
        model itself run, and so do those that the model's modules had before.
        ``load_state_dict`` copies tensors in place, with ``assign=True`` too. What is set on a
        tensor itself cannot be refused: ``parameter.requires_grad = True`` has no effect.

    Raises:
        TypeError: ``model`` is not a module; ``dtype`` is not one of these.
        ValueError: ``model`` is already frozen.
        BackendUnavailable: A parameter is on another kind of device, or they are on several.
    """
    if dtype is not None and dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"freeze: dtype: expected one of ({names}) or None, got {dtype}")
    expect_trainable("freeze", model)
    frozen = fuse(model).eval()
    _check_device(frozen)
    own = dtype or next((p.dtype for p in frozen.parameters() if p.is_floating_point()), None)
    groups = list(groups_of(frozen))
    with torch.no_grad():
        for module in list(frozen.modules()):
            if isinstance(module, FusedForward):
                _freeze_groups(module, dtype, winograd)
        _own_tensors(frozen, dtype)
    modules = [m for m in frozen.modules() if not isinstance(m, torch.jit.ScriptModule)]
    for module in modules:
        module.__class__ = original_class(module)
        for name in _OF_FUSE:
            module.__dict__.pop(name, None)
    for path, group in groups:
        owner = frozen.get_submodule(path)
        owner.__dict__.setdefault("fused_resnet_groups", []).append(_frozen_group(owner, group))
    plans = add_plans(frozen)
    for module in modules:
        module.__class__ = derive(type(module), Lowered if module in plans else Frozen)
        if module in plans:
            module.fused_resnet_plan = plans[module]  # type: ignore[assignment]
    if not isinstance(frozen, torch.jit.ScriptModule):
        frozen.__class__ = derive(type(frozen), FrozenRoot)
        frozen.frozen_dtype = own  # type: ignore[assignment]
        frozen.cuda_graphs = Graphs(size_for(frozen, graphs))  # type: ignore[assignment]
    derived = Derived()
    for module in modules:
        module.seal(derived)  # type: ignore[operator]
    return frozen


#: What :func:`fused_resnet.fuse` gave to modules; a frozen model runs programs, or the modules' own
#: forwards.
_OF_FUSE = ("fused_resnet_generated", "fused_resnet_recompute", "fused_resnet_winograd")


def _frozen_group(owner: nn.Module, group: Group) -> Group:
    """What the report says of a group of a frozen module."""
    conv = owner.get_submodule(group.conv) if group.conv else None
    if isinstance(conv, FrozenConv) or not group.operation:
        return group
    return replace(group, operation="", reason="its batch norm can't be folded into a convolution")


def _freeze_groups(owner: FusedForward, dtype: torch.dtype | None, winograd: bool) -> None:
    for group in owner.fused_groups():
        if not group.operation or not group.conv or not group.foldable:
            continue
        conv, bn = owner.get_submodule(group.conv), owner.get_submodule(group.bn)
        if isinstance(conv, PackedConv) or bn.running_mean is None:
            continue  # statistics of the batch cannot be folded
        assert isinstance(conv, nn.Conv2d)
        frozen = FrozenConv(conv, bn, dtype, winograd)
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
    """Replace the parameters and buffers of unfused modules by one copy each, in the dtype."""
    copies: dict[int, Tensor] = {}
    for module in model.modules():
        if isinstance(module, FrozenConv):
            continue
        # Statistics stay float32, as PyTorch's batch norm allows: half precision loses digits.
        keep = isinstance(module, nn.modules.batchnorm._NormBase) and dtype in (
            torch.bfloat16,
            torch.float16,
        )
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in copies:
                    cast = dtype is not None and tensor.is_floating_point() and not keep
                    # Maps' memory formats are kept; of a matrix each call would need a copy.
                    own = tensor.detach().clone()
                    own = own.contiguous() if own.dim() <= 2 else own
                    own = own.to(dtype if cast else tensor.dtype)
                    copies[id(tensor)] = (
                        nn.Parameter(own, requires_grad=False)
                        if isinstance(tensor, nn.Parameter)
                        else own
                    )
                tensors[name] = copies[id(tensor)]  # type: ignore[assignment]
