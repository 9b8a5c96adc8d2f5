"""A mark for functions whose result is a constant to the compiler.

``torch.compiler.assume_constant_result`` sets the same attribute, but imports the whole compiler to
do so, which takes longer than everything else that ``import fused_resnet`` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def assume_constant_result(function: Function) -> Function:
    """Let a compiler call the function while it traces, and keep the result as a constant.

    Args:
        function: Gives the same result whenever it is called with these arguments.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
