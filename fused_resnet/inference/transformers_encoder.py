"""The encoder of transformers' ResNet, which returns an object that ``torch.fx`` cannot trace.

In a frozen model its early stages run in micro-batches.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

from torch import Tensor, nn

from ..nn.module_kinds import is_observed, original_class
from .frozen_module import Frozen
from .micro_batches import run_micro_batches

_MODULE = "transformers.models.resnet.modeling_resnet"
#: A pixel after the stem covers 4 x 4 of the image.
_IMAGE_PIXELS = 16

_PARAMETERS = ["self", "hidden_state", "output_hidden_states", "return_dict"]


class TransformersEncoder(Frozen):
    """Mixin for a frozen ``ResNetEncoder``.

    Source:
        ``transformers.models.resnet.modeling_resnet.ResNetEncoder.forward``.
    """

    def forward(
        self, hidden_state: Tensor, output_hidden_states: bool = False, return_dict: bool = True
    ) -> Any:
        """The stages in order, the early ones in micro-batches.

        Args:
            hidden_state: ``(N, C, H, W)``, the stem's result.
            output_hidden_states: Return every stage's result; the encoder's own forward then runs.
            return_dict: Return transformers' result object rather than a tuple.

        Returns:
            What the encoder's own forward returns.
        """
        stages: list[Any] = list(self.stages)  # type: ignore[arg-type]
        if output_hidden_states or len(stages) < 3 or is_observed(hidden_state):
            own: Any = super().forward
            return own(hidden_state, output_hidden_states, return_dict)

        def early(x: Tensor) -> Tensor:
            for stage in stages[:-2]:
                x = stage(x)
            return x

        def members() -> list[nn.Module]:
            return [stage.layers for stage in stages[:-2]]  # what the stages' forwards call

        y = run_micro_batches(self, early, hidden_state, members, _IMAGE_PIXELS)
        y = stages[-1](stages[-2](y))
        if not return_dict:
            return (y,)
        result = sys.modules[_MODULE].BaseModelOutputWithNoAttention
        return result(last_hidden_state=y, hidden_states=None)


def is_resnet_encoder(module: nn.Module) -> bool:
    """Whether the module is that encoder, in a version whose forward is the one above."""
    home = sys.modules.get(_MODULE)
    encoder, stage = getattr(home, "ResNetEncoder", None), getattr(home, "ResNetStage", None)
    if encoder is None or stage is None or original_class(module) is not encoder:
        return False
    parameters = list(inspect.signature(encoder.forward).parameters)
    known = parameters == _PARAMETERS and hasattr(home, "BaseModelOutputWithNoAttention")
    return known and all(original_class(member) is stage for member in module.stages)  # type: ignore[union-attr]
