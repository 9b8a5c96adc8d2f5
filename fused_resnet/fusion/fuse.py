"""``fuse``: the same model, with the forwards of its blocks replaced by fused ones.

A block is fused by giving the copied instance a class derived from its own, with a route of
:mod:`fused_resnet.blocks` in front: ``isinstance`` checks, attribute paths, ``state_dict`` keys and
hooks on the block stay as they are. Blocks of torchvision and chains have routes written by hand,
which :data:`MATCHERS` choose; any other module is traced (:mod:`fused_resnet.swap`).
"""

from __future__ import annotations

import copy
import copyreg
import pickle
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _WrappedHook
from torch.nn.parallel import DistributedDataParallel

from ..nn.fused_forward import (
    BasicBlockForward,
    BottleneckForward,
    FusedForward,
    ResNetForward,
    SequentialForward,
)
from ..nn.groups import sequence_groups
from ..nn.module_kinds import PackedConv
from .trace import Left, Plan, TracedForward, parents_of, plan_of

#: What is said of a module: the route to put in front of its class or the forward made for it, the
#: reason to leave it, or None when there is nothing to say.
Verdict = type[FusedForward] | Plan | Left | str | None


def fuse(model: nn.Module, *, recompute: bool = False, winograd: bool = True) -> nn.Module:
    """A copy of the model's structure whose blocks run fused; parameters and buffers are shared.

    Nothing is folded and nothing is copied that training changes: the fused model reads the live
    parameters at every call, trains, and has the ``state_dict`` keys of the original. An optimizer
    built on either trains both, since both hold the same Parameter objects. Train and eval mode are
    each model's own. What cannot be proved equal is left as it is; :func:`fused_resnet.report`
    says why.

    Args:
        model: Any module; convolution, batch norm, addition and ReLU are fused wherever a module's
            forward calls them. It is not changed.
        recompute: In training, do not keep the result of a bottleneck's last convolution for
            backward but compute it there again: a third less memory for one 1x1 convolution more in
            each bottleneck. The numbers are the same.
        winograd: In training on the CPU, whether 3x3 convolutions of stride 1 may run by Winograd's
            algorithm, forward and backward: faster, in float32 with a relative error of 1e-6 and in
            the weight's gradient up to 3e-6, where the direct sum has about 3e-7.

    Returns:
        The fused model. Fusing it again gives an equal one.

    Raises:
        TypeError: ``model`` is not a module, or holds something that cannot be copied.
        ValueError: ``model`` was made by :func:`fused_resnet.freeze`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: model: expected a torch.nn.Module, got {type(model).__name__}")
    if any(isinstance(m, PackedConv) for m in model.modules()):
        raise ValueError("fuse: model: expected a trainable model, got one that freeze() made")
    fused = copy_structure(model)
    parents = parents_of(fused)
    # All verdicts first: a module is traced with the children as they were.
    verdicts = [(module, verdict_of(module, parents)) for module in fused.modules()]
    for module, verdict in verdicts:
        if isinstance(verdict, Plan):
            module.__class__ = derive(type(module), TracedForward)
            module.fused_resnet_plan = verdict  # type: ignore[assignment]
        elif isinstance(verdict, type):
            module.__class__ = derive(type(module), verdict)
    for module in fused.modules():
        if isinstance(module, FusedForward):
            module.fused_resnet_recompute = recompute
            module.fused_resnet_winograd = winograd
    return fused


def verdict_of(module: nn.Module, parents: Counter[int]) -> Verdict:
    """What is to be done with a module; None for one that is fused, or has nothing to fuse.

    Args:
        module: Of a model.
        parents: In how many places each module of the model is.
    """
    if isinstance(module, FusedForward):
        return None
    for matcher in MATCHERS:
        verdict = matcher(module)
        if verdict is not None:
            return verdict
    return plan_of(module, parents)


# Matchers


def _torchvision_block(module: nn.Module) -> Verdict:
    resnet = sys.modules.get("torchvision.models.resnet")
    routes: tuple[tuple[str, type[FusedForward]], ...] = (
        ("BasicBlock", BasicBlockForward),
        ("Bottleneck", BottleneckForward),
    )
    for name, route in routes:
        base = getattr(resnet, name, None)
        if base is not None and isinstance(module, base):
            return route if _keeps(module, base, "forward") else None
    return None


def _torchvision_resnet(module: nn.Module) -> Verdict:
    base = getattr(sys.modules.get("torchvision.models.resnet"), "ResNet", None)
    if base is None or not isinstance(module, base):
        return None
    kept = all(_keeps(module, base, method) for method in ("forward", "_forward_impl"))
    return ResNetForward if kept else None


def _sequential(module: nn.Module) -> Verdict:
    if not isinstance(module, nn.Sequential):
        return None
    if type(module).forward is not nn.Sequential.forward:
        return None  # a module of its own, which is traced
    groups = sequence_groups(module._modules)
    if not groups:
        return None
    for method in ("forward", "__iter__"):
        if not _keeps(module, nn.Sequential, method):
            return _overridden(nn.Sequential, method)
    if any(group.operation for group in groups):
        return SequentialForward
    return groups[0].reason


def _keeps(module: nn.Module, base: type[nn.Module], method: str) -> bool:
    same = getattr(type(module), method) is getattr(base, method)
    return same and method not in module.__dict__


def _overridden(base: type[nn.Module], method: str) -> str:
    return f"its {method} is not that of {base.__module__.partition('.')[0]}'s {base.__name__}"


#: Asked in this order. A matcher looks at the code that a module runs, never at names alone.
MATCHERS: list[Callable[[nn.Module], Verdict]] = [
    _torchvision_block,
    _torchvision_resnet,
    _sequential,
]


# Classes made on the fly


#: Made by :func:`derive`.
_DERIVED: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def derive(cls: type[nn.Module], mixin: type[nn.Module]) -> type[nn.Module]:
    """``cls`` with a mix-in in front of it; the same class for the same arguments.

    Instances pickle and deep-copy: a class that no module exports is rebuilt from its parts.
    """
    if issubclass(cls, mixin):
        return cls
    if (cls, mixin) in _DERIVED:
        return _DERIVED[cls, mixin]
    base = getattr(cls, "fused_resnet_base", cls)
    mixins = (mixin, *getattr(cls, "fused_resnet_mixins", ()))
    name = getattr(mixin, "fused_resnet_prefix", "Fused") + base.__name__
    members: dict[str, Any] = {
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce,
        "fused_resnet_base": base,
        "fused_resnet_mixins": mixins,
    }
    own = getattr(mixin, "fused_resnet_members", None)
    members |= own(base) if own else {}
    # The metaclass of the base, as a class statement would choose it.
    _DERIVED[cls, mixin] = types.new_class(
        name, (*mixins, base), exec_body=lambda namespace: namespace.update(members)
    )
    return _DERIVED[cls, mixin]


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    cls = type(self)
    # Past every class made by derive, to how the base pickles.
    constructor, arguments, *rest = super(cls, self).__reduce_ex__(protocol)
    if constructor is copyreg.__newobj__ and arguments == (cls,):  # type: ignore[attr-defined]
        return (_rebuild, (cls.fused_resnet_base, cls.fused_resnet_mixins), *rest)
    return (constructor, arguments, *rest)


def _rebuild(base: type[nn.Module], mixins: tuple[type[nn.Module], ...]) -> nn.Module:
    cls = base
    for mixin in reversed(mixins):
        cls = derive(cls, mixin)
    return cls.__new__(cls)


# The copy


def copy_structure(model: nn.Module) -> nn.Module:
    """A deep copy in which every tensor and every hook is the original's own object."""
    if isinstance(model, DistributedDataParallel):
        # What reduces its gradients is tied to the parameters, which stay the same.
        copied = model.__class__.__new__(model.__class__)
        copied.__dict__ = dict(model.__dict__)
        copied._modules = {"module": copy_structure(model.module)}
        return copied
    memo: dict[int, Any] = {}
    members = {id(module) for module in model.modules()}
    for module in model.modules():
        attributes = (module._parameters, module._buffers, module.__dict__)
        tensors = [t for held in attributes for t in held.values() if isinstance(t, torch.Tensor)]
        hooks = [hook for hook in _hooks(module) if not _is_method_of(hook, members)]
        for shared in (*tensors, *hooks):
            memo[id(shared)] = shared
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, pickle.PicklingError) as error:
        raise TypeError(
            f"fuse: model: expected a module that copy.deepcopy can copy, got {error}"
        ) from error


def _hooks(module: nn.Module) -> Iterator[Any]:
    for name, held in module.__dict__.items():
        if name.endswith("_hooks") and isinstance(held, dict):
            for hook in held.values():
                # The wrapper refers to its module and is copied with it; what it wraps is shared.
                yield hook.hook if isinstance(hook, _WrappedHook) else hook


def _is_method_of(hook: Any, members: set[int]) -> bool:
    """Whether the hook is a method of a copied module: then the copy's method is to be called."""
    return isinstance(hook, types.MethodType) and id(hook.__self__) in members
