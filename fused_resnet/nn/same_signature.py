"""A forward with the signature of another class's, which tracers and exporters read."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


def forward_like(base: type[nn.Module], call: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that passes its arguments on, without those that have their defaults.

    Args:
        base: The class that has the signature.
        call: Called with the module and the arguments.

    Returns:
        A function whose parameters have the names, kinds and defaults of ``base.forward``'s.
    """
    parameters = list(inspect.signature(base.forward).parameters.values())
    values: dict[str, Any] = {"_forward": call}
    declared: list[str] = []
    passed: list[str] = []
    required: list[str] = []
    at_defaults: list[str] = []
    starred = False
    for p in parameters:
        text, argument = p.name, p.name
        if p.kind is p.VAR_POSITIONAL:
            text = argument = f"*{p.name}"
            starred = True
        elif p.kind is p.VAR_KEYWORD:
            text = argument = f"**{p.name}"
        elif p.kind is p.KEYWORD_ONLY:
            argument = f"{p.name}={p.name}"
            if not starred:
                declared.append("*")
                starred = True
        if p.default is p.empty:
            required.append(argument)
        else:
            values[f"_default_{p.name}"] = p.default
            text = f"{p.name}=_default_{p.name}"
            at_defaults.append(f"{p.name} is _default_{p.name}")
        declared.append(text)
        passed.append(argument)
        if p.kind is p.POSITIONAL_ONLY and p is [q for q in parameters if q.kind is p.kind][-1]:
            declared.append("/")
    lines = [f"def forward({', '.join(declared)}):"]
    if at_defaults and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        lines.append(f"    if {' and '.join(at_defaults)}:")
        lines.append(f"        return _forward({', '.join(required)})")
    lines.append(f"    return _forward({', '.join(passed)})")
    exec(compile("\n".join(lines), "<fused_resnet forward>", "exec"), values)
    forward: Callable[..., Any] = values["forward"]
    forward.__doc__ = base.forward.__doc__
    return forward
