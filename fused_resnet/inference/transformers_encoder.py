"""The encoder of transformers' ResNet, whose forward returns an object that no trace can follow.

Only its early stages matter here: a frozen one runs them for some images at a time.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

from torch import Tensor, nn

from ..nn.module_kinds import is_observed, original_class
from .frozen_module import Frozen
from .micro_batches import run_micro_batches

_HOME = "transformers.models.resnet.modeling_resnet"
#: A pixel behind the stem stands for 4 x 4 of the image.
_IMAGE_PIXELS = 16

_PARAMETERS = ["self", "hidden_state", "output_hidden_states", "return_dict"]


class TransformersEncoder(Frozen):
    """Mixed into a frozen ``ResNetEncoder``.

    Source:
        ``transformers.models.resnet.modeling_resnet.ResNetEncoder.forward``.
    """

    def forward(
        self, hidden_state: Tensor, output_hidden_states: bool = False, return_dict: bool = True
    ) -> Any:
        """As the encoder's own, which runs where every stage's result is asked for."""
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
        result = sys.modules[_HOME].BaseModelOutputWithNoAttention
        return result(last_hidden_state=y, hidden_states=None)


def is_resnet_encoder(module: nn.Module) -> bool:
    """Whether the module is that encoder, with the forward that is known here, and its stages."""
    home = sys.modules.get(_HOME)
    encoder, stage = getattr(home, "ResNetEncoder", None), getattr(home, "ResNetStage", None)
    if encoder is None or stage is None or original_class(module) is not encoder:
        return False
    parameters = list(inspect.signature(encoder.forward).parameters)
    known = parameters == _PARAMETERS and hasattr(home, "BaseModelOutputWithNoAttention")
    return known and all(original_class(member) is stage for member in module.stages)  # type: ignore[union-attr]
