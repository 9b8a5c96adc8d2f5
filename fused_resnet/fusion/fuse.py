"""``fuse``: a copy of a model whose modules have fused forwards.

The copied instance gets a class derived from its own with a mixin that replaces ``forward``, so
``isinstance`` checks, attribute paths, ``state_dict`` keys and hooks are unaffected. Torchvision's
blocks and ``nn.Sequential`` have mixins in :mod:`fused_resnet.nn.fused_forward`, which
:data:`MATCHERS` choose; any other module is traced (:mod:`fused_resnet.fusion.trace`).
"""

from __future__ import annotations

import copy
import copyreg
import pickle
import sys
import types
import weakref
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
from ..nn.same_signature import forward_like
from .trace import GeneratedForward, TracedForward, Unfused, generate_forward, parents_of

#: What to do with a module: the mixin or the generated forward that fuses it, the reason why it is
#: not fused, or None when it has nothing to fuse.
ModuleDecision = type[FusedForward] | GeneratedForward | Unfused | str | None


def expect_trainable(op: str, model: nn.Module) -> None:
    """Refuse what is no module, and a frozen model.

    Args:
        op: Name of the function that was given the model, for error messages.
        model: The model.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``model`` was returned by :func:`fused_resnet.freeze`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model: expected a torch.nn.Module, got {type(model).__name__}")
    if any(isinstance(m, PackedConv) for m in model.modules()):
        raise ValueError(f"{op}: model: expected a trainable model, got one that freeze() made")


def fuse(model: nn.Module, *, recompute: bool = False, winograd: bool = True) -> nn.Module:
    """A copy of a model that runs fused and shares the model's parameters and buffers.

    Nothing is folded or cached: the fused model reads its parameters at every call, can be trained,
    and has the ``state_dict`` keys of the original. Both models have the same Parameter objects, so
    an optimizer of either trains both. Each has its own train or eval mode. Modules that cannot be
    fused without a change of results are left as they are; :func:`fused_resnet.report` lists them
    with the reasons.

    Args:
        model: Any module, which is not changed; convolution, batch norm, addition and ReLU are
            fused wherever the forward of a module calls them.
        recompute: In training, whether the result of a bottleneck's last convolution is computed
            again in backward instead of being saved: a third less memory, for one more 1x1
            convolution in each bottleneck. A projection that takes no more multiply-adds than that
            one is computed again too, as in the first stage. Results are the same.
        winograd: In training on the CPU, whether 3x3 convolutions of stride 1 may use Winograd's
            algorithm, forward and backward, and in the blocks of a frozen backbone. It is faster;
            its relative error in float32 is 1e-6, and up to 3e-6 in the weight's gradient, where
            the direct sum has about 3e-7.

    Returns:
        The fused model. Fusing a fused model has no effect.

    Raises:
        TypeError: ``model`` is not a module, or ``copy.deepcopy`` cannot copy it.
        ValueError: ``model`` was returned by :func:`fused_resnet.freeze`.
    """
    expect_trainable("fuse", model)
    fused = copy_structure(model)
    parents = parents_of(fused)
    # Decide for all modules before any class changes: a trace must see the original children.
    decisions = [(module, decide_module(module, parents)) for module in fused.modules()]
    for module, decision in decisions:
        if isinstance(decision, GeneratedForward):
            module.__class__ = derive(type(module), TracedForward)
            module.fused_resnet_generated = decision  # type: ignore[assignment]
        elif isinstance(decision, type):
            module.__class__ = derive(type(module), decision)
    for module in fused.modules():
        if isinstance(module, FusedForward):
            module.fused_resnet_recompute = recompute
            module.fused_resnet_winograd = winograd
    return fused


def decide_module(module: nn.Module, parents: Counter[int]) -> ModuleDecision:
    """How to fuse a module; None for one that is fused already or has nothing to fuse.

    Args:
        module: A module of a model.
        parents: The number of parents of each module of the model, by ``id``.
    """
    if isinstance(module, FusedForward):
        return None
    for matcher in MATCHERS:
        decision = matcher(module)
        if decision is not None:
            return decision
    return generate_forward(module, parents)


# Matchers


def _torchvision_block(module: nn.Module) -> ModuleDecision:
    resnet = sys.modules.get("torchvision.models.resnet")
    mixins: tuple[tuple[str, type[FusedForward]], ...] = (
        ("BasicBlock", BasicBlockForward),
        ("Bottleneck", BottleneckForward),
    )
    for name, mixin in mixins:
        base = getattr(resnet, name, None)
        if base is not None and isinstance(module, base):
            return mixin if _inherits(module, base, "forward") else None
    return None


def _torchvision_resnet(module: nn.Module) -> ModuleDecision:
    base = getattr(sys.modules.get("torchvision.models.resnet"), "ResNet", None)
    if base is None or not isinstance(module, base):
        return None
    inherited = all(_inherits(module, base, method) for method in ("forward", "_forward_impl"))
    return ResNetForward if inherited else None


def _sequential(module: nn.Module) -> ModuleDecision:
    if not isinstance(module, nn.Sequential):
        return None
    if type(module).forward is not nn.Sequential.forward:
        return None  # a forward of its own, which is traced
    groups = sequence_groups(module._modules)
    if not groups:
        return None
    for method in ("forward", "__iter__"):
        if not _inherits(module, nn.Sequential, method):
            return _overridden(nn.Sequential, method)
    if any(group.operation for group in groups):
        return SequentialForward
    return groups[0].reason


def _inherits(module: nn.Module, base: type[nn.Module], method: str) -> bool:
    same = getattr(type(module), method) is getattr(base, method)
    return same and method not in module.__dict__


def _overridden(base: type[nn.Module], method: str) -> str:
    return f"its {method} is not that of {base.__module__.partition('.')[0]}'s {base.__name__}"


#: Tried in this order. A matcher must check the code that a module runs, not only its class's name.
MATCHERS: list[Callable[[nn.Module], ModuleDecision]] = [
    _torchvision_block,
    _torchvision_resnet,
    _sequential,
]


# Derived classes


#: The classes that :func:`derive` has created. One that nothing else refers to any more is dropped.
_DERIVED: weakref.WeakValueDictionary[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = (
    weakref.WeakValueDictionary()
)


def derive(cls: type[nn.Module], mixin: type[nn.Module]) -> type[nn.Module]:
    """A subclass of ``cls`` with a mixin in front of it.

    Its instances can be pickled and deep-copied: the class itself is in no module, so it is rebuilt
    from ``cls`` and the mixins.

    Args:
        cls: The class of a module.
        mixin: A class whose methods take precedence over those of ``cls``.

    Returns:
        The same class each time for the same arguments.
    """
    if issubclass(cls, mixin):
        return cls
    known = _DERIVED.get((cls, mixin))
    if known is not None:
        return known
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
    if getattr(mixin, "fused_resnet_keeps_signature", False):  # tracers and exporters read it
        members["forward"] = forward_like(base, mixin.forward)
    # new_class picks the metaclass as a class statement does.
    derived = types.new_class(
        name, (*mixins, base), exec_body=lambda namespace: namespace.update(members)
    )
    _DERIVED[cls, mixin] = derived
    return derived


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    cls = type(self)
    # Skip the derived classes and pickle as the original class does.
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
    """A deep copy of a model that shares its tensors and hooks.

    Args:
        model: The model; hooks that are methods of its modules become methods of the copies.

    Raises:
        TypeError: ``copy.deepcopy`` cannot copy it.
    """
    if isinstance(model, DistributedDataParallel):
        # Its gradient reducer is bound to the parameters, which both copies share.
        copied = model.__class__.__new__(model.__class__)
        copied.__dict__ = dict(model.__dict__)
        copied._modules = {"module": copy_structure(model.module)}
        return copied
    memo: dict[int, Any] = {}
    members = {id(module) for module in model.modules()}
    for module in model.modules():
        attributes = (module._parameters, module._buffers, module.__dict__)
        tensors = [t for d in attributes for t in d.values() if isinstance(t, torch.Tensor)]
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
    for name, value in module.__dict__.items():
        if name.endswith("_hooks") and isinstance(value, dict):
            for hook in value.values():
                # The wrapper refers to its module and is copied with it; the hook in it is shared.
                yield hook.hook if isinstance(hook, _WrappedHook) else hook


def _is_method_of(hook: Any, members: set[int]) -> bool:
    """Whether the hook is a method of a copied module, whose copy has to be called instead."""
    return isinstance(hook, types.MethodType) and id(hook.__self__) in members
