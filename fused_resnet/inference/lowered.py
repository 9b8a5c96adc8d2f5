"""The forward of a frozen module that has a plan, and the making of plans.

A plan runs where a call is a plain one. Where something observes it (a global hook, a tracer,
autocast, a forced backend) the modules run one by one.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.availability import is_exporting, resolve_backend
from ..fusion.trace.errors import Untraceable
from ..nn.module_kinds import PackedConv, is_hooked, is_observed, original_class
from ..ops.program_steps import Step
from .frozen_module import Frozen
from .frozen_trace import graphs_of, has_code, is_inlinable
from .plan import Plan, Run, Slot, function_of, mapped, plan_of, plan_of_step
from .program import BoundProgram
from .run_steps import are_separate, run_steps


class Lowered(Frozen):
    """Mixin for a frozen module whose forward is a plan.

    Attributes:
        fused_resnet_plan: The plan: the module's programs, and the calls between them.
    """

    fused_resnet_plan: Plan
    fused_resnet_keeps_signature = True

    def seal(self, derived: Any) -> None:
        """Look up the modules of the programs, which from now on stay the same.

        Args:
            derived: Values derived from the model's tensors, which all modules of the model share.
        """
        super().seal(derived)
        programs = [BoundProgram(p, self) for p in self.fused_resnet_plan.programs]
        self.__dict__["_frozen_programs"] = programs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The plan, or the module's own forward for another call.

        Args:
            args: Positional arguments of the original forward.
            kwargs: Keyword arguments of the original forward.
        """
        programs: list[BoundProgram] | None = self.__dict__.get("_frozen_programs")
        if programs is None or not args:
            return super().forward(*args, **kwargs)
        plan, x = self.fused_resnet_plan, args[0]
        backend = _backend_of(x)
        if not backend:
            return super().forward(*args, **kwargs)
        if len(args) == 1 and not kwargs and len(plan.names) == 1 and not plan.conditions:
            tensors: Any = args
        else:
            tensors = plan.bind(args, kwargs)
        if tensors is None or (plan.dim and x.dim() != plan.dim):
            return super().forward(*args, **kwargs)
        if plan.channels and (x.dim() != 4 or x.shape[1] != plan.channels):
            return super().forward(*args, **kwargs)  # whose modules say what is wrong
        if plan.dim == 2:
            x = x[:, :, None, None]
        if plan.single:
            return self._run(programs[0], x, backend)[0]
        return self._run_plan(plan, programs, tensors, backend, args, kwargs)

    def _run(self, program: BoundProgram, x: Tensor, backend: str) -> list[Tensor]:
        values = self.__dict__["_frozen_derived"].values
        if backend == "native":
            native = values.get(program)
            if native is None:
                native = values[program] = program.native()
            outputs: list[Tensor] = native(x)
            return outputs
        if is_exporting():
            return program.exported(x)
        return run_steps(program, x, backend, values)

    def _run_plan(
        self,
        plan: Plan,
        programs: list[BoundProgram],
        tensors: tuple[Any, ...],
        backend: str,
        args: Any,
        kwargs: Any,
    ) -> Any:
        conditions = dict(plan.conditions)
        slots: list[Any] = [*tensors, *[None] * (plan.size - len(tensors))]

        def value_of(leaf: Any) -> Any:
            return slots[leaf.number] if type(leaf) is Slot else leaf

        for item in plan.items:
            if isinstance(item, Run):
                outputs = self._run(programs[item.program], slots[item.input], backend)
                for slot, output in zip(item.outputs, outputs, strict=True):
                    slots[slot] = output
                continue
            given = mapped(item.args, value_of)
            named = mapped(item.kwargs, value_of)
            if item.kind == "call_module":
                result = self.get_submodule(item.target)(*given, **named)
            elif item.kind == "call_function":
                result = function_of(item.target)(*given, **named)
            elif item.kind == "call_method":
                result = getattr(given[0], item.target)(*given[1:], **named)
            else:
                owner, _, name = item.target.rpartition(".")
                result = getattr(self.get_submodule(owner), name)
            slots[item.output] = result
            if item.output in conditions and bool(result) is not conditions[item.output]:
                return super().forward(*args, **kwargs)
        return mapped(plan.result, value_of)


def _backend_of(x: Any) -> str:
    """How programs run for this input; empty where the modules must run one by one."""
    if not isinstance(x, Tensor) or is_observed(x) or torch.jit.is_tracing():
        return ""
    kind = x.device.type
    backend = resolve_backend("residual_block", x)
    if backend not in ("cpu", "cuda", "triton"):
        return ""
    plain = kind == backend == "cpu" and type(x) in (Tensor, nn.Parameter)
    observed = torch.compiler.is_compiling() or torch.is_autocast_enabled(kind)
    return "native" if plain and not observed and not are_separate() else backend


# Making plans


def add_plans(model: nn.Module) -> dict[nn.Module, Plan]:
    """The plans of a frozen model's modules, of the largest that can be traced and their parts.

    Args:
        model: The frozen model, not sealed yet.
    """
    plans: dict[nn.Module, Plan] = {}
    _trace_largest(model, plans)
    return plans


def _trace_largest(module: nn.Module, plans: dict[nn.Module, Plan]) -> frozenset[str]:
    """Plan the largest modules that can be traced.

    Args:
        module: The module.
        plans: Receives the plans.

    Returns:
        The paths of the submodules that can be traced as part of others; with the empty path, the
        module itself.
    """
    inner = dict(module.named_modules())
    inline = frozenset(path for path, m in inner.items() if path and is_inlinable(m))
    if not has_code(module):
        inline = frozenset()
    elif _add_plans_of(module, inline, plans):
        for path, m in inner.items():
            if path and path not in inline:
                _trace_largest(m, plans)  # a module with a hook
        return inline | ({""} if is_inlinable(module) else set())
    found: set[str] = set()
    for name, child in module.named_children():
        found |= {f"{name}.{path}".rstrip(".") for path in _trace_largest(child, plans)}
    if found < inline and _add_plans_of(module, frozenset(found), plans) and is_inlinable(module):
        found.add("")
    return frozenset(found)


def _add_plans_of(module: nn.Module, inline: frozenset[str], plans: dict[nn.Module, Plan]) -> bool:
    """Trace one module and plan it and what it calls; whether it could be traced."""
    if not any(isinstance(m, PackedConv) for m in module.modules()):
        return has_code(module)
    try:
        graphs = list(graphs_of(module, inline))
    except Untraceable:
        return False
    for traced in graphs:
        owner = module.get_submodule(traced.path)
        with contextlib.suppress(Untraceable):
            plan = None if owner in plans else plan_of(owner, traced)
            if plan is not None:
                plans[owner] = plan
                _plan_head(owner, plan, plans)
    return True


def _plan_head(owner: nn.Module, plan: Plan, plans: dict[nn.Module, Plan]) -> None:
    """Plan a program's fully connected layers and pools also as modules that are called alone."""
    for program in plan.programs:
        for step, path in zip(program.steps, program.modules, strict=True):
            layer = owner.get_submodule(path)
            if step.operation == "linear":
                plans[layer] = plan_of_step(step._replace(tensor=0, input=0), 2)
    for layer in owner.modules():
        is_pool = original_class(layer) is nn.AdaptiveAvgPool2d and not is_hooked(layer)
        if is_pool and layer.output_size in (1, (1, 1)):
            plans[layer] = plan_of_step(Step("global_avg_pool", 0), 4)
