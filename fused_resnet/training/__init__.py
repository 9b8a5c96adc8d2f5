"""Training: what ``fused-resnet train`` and ``fused-resnet story`` do.

>>> from fused_resnet import training
>>> settings = training.Settings(model="resnet18", data="photos", out="run", epochs=5)
>>> training.train(settings).best_accuracy
"""

from .errors import DivergedError, TrainingError
from .recipe import SHIPPED
from .recipe import read as read_recipe
from .run import Result, resumed, train
from .settings import Settings, from_mapping

__all__ = [
    "SHIPPED",
    "DivergedError",
    "Result",
    "Settings",
    "TrainingError",
    "from_mapping",
    "read_recipe",
    "resumed",
    "train",
]
