"""What every module of a frozen model refuses: changes, inner hooks, training and conversions.

A frozen model is sealed once, at the end of :func:`fused_resnet.freeze`. From then on nothing has
to be asked again at a call: what was derived from its tensors (:class:`Derived`) is valid until one
of them is replaced, as loading a state dict does.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..nn.fused_forward import FusedForward
from ..nn.groups import Group
from ..nn.module_kinds import PackedConv, is_hooked

#: What to do in place of a change, by its kind.
_TRAIN = "use the model that freeze() was given"
_CHANGE = "change the model that freeze() was given and freeze it again"
_HOOK = (
    "register the hook on the frozen model itself, or before freeze() on the model that it is given"
)


def refuse(what: str, instead: str = _TRAIN) -> NoReturn:
    """Raise the error of a change of a frozen model.

    Args:
        what: The change.
        instead: Advice on what to do in its place.

    Raises:
        RuntimeError: Always.
    """
    raise RuntimeError(f"{what}: this model is frozen for inference; {instead}")


class Derived:
    """What was derived from the tensors of a frozen model; its modules share one object.

    Copies and pickles begin without any of it.

    Attributes:
        values: Derived values by module and purpose; emptied when a tensor of the model is
            replaced.
        generation: Number of times that it was emptied.
    """

    def __init__(self) -> None:
        self.values: dict[Any, Any] = {}
        self.generation = 0

    def clear(self) -> None:
        """Forget all of it, as a tensor of the model was replaced."""
        self.generation += 1
        self.values = {}

    def __reduce__(self) -> tuple[type[Derived], tuple[()]]:
        return Derived, ()


class SealedDict(dict[str, Any]):
    """The children, parameters or buffers of a frozen module.

    A tensor may replace another one, as in ``torch.func.functional_call``; everything else is
    refused. Its copies and pickles are plain dictionaries.

    Args:
        members: Children, parameters or buffers, by name.
        derived: Values derived from the model's tensors; cleared when a tensor is replaced.
    """

    def __init__(self, members: Mapping[str, Any], derived: Derived) -> None:
        super().__init__(members)
        self.derived = derived

    def __setitem__(self, name: str, value: Any) -> None:
        if not isinstance(self.get(name), Tensor) or not isinstance(value, Tensor):
            refuse(f"setting {name}", _CHANGE)
        super().__setitem__(name, value)
        self.derived.clear()

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        refuse("changing its members", _CHANGE)

    __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


#: The dictionaries of a module that are sealed.
_MEMBERS = ("_modules", "_parameters", "_buffers")


class Frozen(nn.Module):
    """Mixin for every module of a frozen model.

    Attributes:
        fused_resnet_settable: Names of the attributes that may be set.
        fused_resnet_groups: What :func:`fused_resnet.report` says of the module's children.
    """

    fused_resnet_prefix = "Frozen"
    fused_resnet_settable = frozenset({"_is_torch_compile"})  # which torch.compile sets
    fused_resnet_groups: Sequence[Group] = ()
    __prepare_scriptable__ = FusedForward.__prepare_scriptable__

    def seal(self, derived: Derived) -> None:
        """Refuse changes from now on.

        Args:
            derived: The object that all modules of the model share.
        """
        for name in _MEMBERS:
            self.__dict__[name] = SealedDict(self.__dict__[name], derived)
        self.__dict__["_frozen_derived"] = derived

    def __setattr__(self, name: str, value: Any) -> None:
        if "_frozen_derived" in self.__dict__ and not self._may_set(name, value):
            if name == "qconfig":  # which torch.ao.quantization sets first
                refuse("quantisation")
            refuse(f"setting {name}", _CHANGE)
        if isinstance(self.__dict__.get("_buffers"), SealedDict) and name in self._buffers:
            self._buffers[name] = value
        else:
            super().__setattr__(name, value)

    def _may_set(self, name: str, value: Any) -> bool:
        if name == "training":
            return value is False
        if name in self.fused_resnet_settable:
            return True
        if is_hooked(self) and isinstance(self.__dict__.get(name), Tensor):
            return isinstance(value, Tensor)  # torch.nn.utils.weight_norm computes it in a hook
        # Some forwards keep results in attributes, as that of torchvision's AnchorGenerator does.
        plain = not name.startswith("__") and not isinstance(value, (nn.Module, nn.Parameter))
        return plain and _is_method_of(self, sys._getframe(2))

    def __delattr__(self, name: str) -> None:
        if "_frozen_derived" in self.__dict__:
            refuse(f"deleting {name}", _CHANGE)
        super().__delattr__(name)

    def train(self, mode: bool = True) -> Frozen:
        """Accept ``train(False)``, which is ``eval()``; raise for ``train(True)``.

        Args:
            mode: False for eval mode, in which a frozen model always is.

        Raises:
            RuntimeError: ``mode`` is True.
        """
        if mode:
            refuse("train()")
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Frozen:
        """Accept ``requires_grad_(False)``; raise for ``requires_grad_(True)``.

        Args:
            requires_grad: False; the parameters of a frozen model need no gradient.

        Raises:
            RuntimeError: ``requires_grad`` is True.
        """
        if requires_grad:
            refuse("requires_grad_()")
        return super().requires_grad_(False)

    def __getstate__(self) -> dict[str, Any]:
        own = ("_compiled_call_impl", "_frozen_programs")
        state = {k: v for k, v in self.__dict__.items() if k not in own}
        return state | {name: dict(state[name]) for name in _MEMBERS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        derived = state.pop("_frozen_derived", None)
        super().__setstate__(state)
        if derived is not None:
            self.seal(derived)

    def _replicate_for_data_parallel(self) -> Frozen:
        # As in nn.Module, and not sealed: its caller sets the tensors and children of the replica.
        replica: Frozen = self.__new__(type(self))
        members = {"_parameters": {}, "_buffers": dict(self._buffers), "_is_replica": True}
        replica.__dict__ = self.__dict__ | members | {"_modules": dict(self._modules)}
        for name in ("_frozen_derived", "_frozen_programs"):
            replica.__dict__.pop(name, None)
        return replica

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Frozen:
        # Checked before the first tensor is converted, so that a refusal leaves the model intact.
        packed: Iterator[Any] = (
            module.packed for module in self.modules() if isinstance(module, PackedConv)
        )
        for dtype, device in {
            (t.dtype, t.device) for t in chain(self.parameters(), self.buffers(), packed)
        }:
            probe = fn(torch.empty(0, dtype=dtype, device=device))
            if probe.dtype != dtype or probe.device != device:
                refuse(f"conversion to {probe.dtype} on {probe.device}")
        super()._apply(fn, recurse)
        self.changed()
        return self

    def changed(self) -> None:
        """Forget what was derived from the model's tensors, of which one was replaced."""
        derived: Derived | None = self.__dict__.get("_frozen_derived")
        if derived is not None:
            derived.clear()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any
    ) -> None:
        # Tensors are copied in place, also where load_state_dict(assign=True) asks to replace them.
        metadata = {**local_metadata, "assign_to_params_buffers": False}
        super()._load_from_state_dict(state_dict, prefix, metadata, *rest)
        self.changed()


def _is_method_of(module: nn.Module, frame: FrameType) -> bool:
    """Whether a frame runs a method of the module's class, and not one that PyTorch gave it."""
    code = frame.f_code
    if not code.co_argcount or frame.f_locals.get(code.co_varnames[0]) is not module:
        return False
    if code.co_filename.startswith(_TORCH_MODULES):
        return False
    methods = (vars(cls).get(code.co_name) for cls in type(module).__mro__)
    return any(getattr(inspect.unwrap(m), "__code__", None) is code for m in methods if m)


_TORCH_MODULES = os.path.dirname(nn.__file__) + os.sep


def _refused(name: str, instead: str) -> Callable[..., Any]:
    def method(self: Frozen, *args: Any, **kwargs: Any) -> Any:
        if "_frozen_derived" in self.__dict__:
            refuse(f"{name}()", instead)
        return getattr(super(Frozen, self), name)(*args, **kwargs)

    method.__name__ = name
    return method


#: Hooks around the calls of a module, in every form that PyTorch has; those of state dicts work.
_HOOKS = (
    "register_forward_pre_hook",
    "register_forward_hook",
    "register_backward_hook",
    "register_full_backward_pre_hook",
    "register_full_backward_hook",
)
_CHANGES = ("add_module", "register_module", "register_buffer", "register_parameter")

for _name in (*_CHANGES, "set_submodule"):
    setattr(Frozen, _name, _refused(_name, _CHANGE))
Frozen.to_empty = _refused("to_empty", _CHANGE)  # type: ignore[method-assign]
for _name in _HOOKS:
    setattr(Frozen, _name, _refused(_name, _HOOK))
