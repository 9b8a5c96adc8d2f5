"""The network of a run: built by name, with weights, a head for its classes, and fused."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ..fusion.fuse import fuse
from ..models import sources
from ..models.weights import is_path, load_weights
from ..nn import sync_batch_norm
from .engine import Engine
from .errors import TrainingError
from .settings import Settings


def build(
    settings: Settings, classes: int, engine: Engine, note: Callable[[str], None]
) -> nn.Module:
    """The network, on its device and in training mode.

    Args:
        settings: Settings of the run.
        classes: Number of classes.
        engine: Device, dtype and processes of the run.
        note: Told what a person should know: a new head, what is frozen.

    Raises:
        TrainingError: The weights can't be read or do not fit.
        UnknownNetworkError: There is no such network.
        MissingPackageError: The network's library is not installed.
    """
    name = sources.parse(settings.model)
    make = sources.plain_model if settings.unfused else sources.our_model
    model = make(name, None, classes)
    if settings.weights is not None:
        _load(model, name, settings.weights, classes, note)
    if settings.freeze_backbone:
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(key.startswith(f"{sources.head_of(name)[0]}."))
    if settings.sync_bn and engine.world > 1:
        model = sync_batch_norm.converted(model, engine.device)
    model = engine.placed(model)
    return model if settings.unfused else fuse(model)


def set_training(model: nn.Module, settings: Settings) -> None:
    """Training mode; a frozen backbone stays in eval mode, so its running statistics stay too.

    Args:
        model: A result of :func:`build`.
        settings: Settings of the run.
    """
    if not settings.freeze_backbone:
        model.train()
        return
    model.eval()
    model.get_submodule(sources.head_of(sources.parse(settings.model))[0]).train()


def _load(
    model: nn.Module, name: str, weights: str, classes: int, note: Callable[[str], None]
) -> None:
    theirs = name in sources.MODELS
    try:
        if not theirs and not is_path(weights):
            raise ValueError(
                "there is no such file; only torchvision's networks have named weights"
            )
        state = load_weights(weights, name=name if theirs else None)
        found = sources.classes_of(name, state)
        if found != classes:
            state = _without_head(state, name)
            note(f"The weights have {found} classes and the data {classes}: the head is made anew.")
        _fill(model, name, state, complete=found == classes)
    except (ValueError, RuntimeError) as error:
        raise TrainingError(f"weights {weights}: {str(error).splitlines()[0]}") from None


def _without_head(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    heads = tuple(f"{head}." for head in sources.head_of(name))
    return {key: value for key, value in state.items() if not key.startswith(heads)}


def _fill(model: nn.Module, name: str, state: dict[str, Tensor], complete: bool) -> None:
    """Load weights, of which only the head may be missing."""
    if name.startswith("hf:") and not any(key.startswith("model.") for key in state):
        state = {f"model.{key}": value for key, value in state.items()}  # the Hub's own keys
    own = dict(model.state_dict())
    if not complete:
        head = f"{sources.head_of(name)[0]}."
        state = state | {key: value for key, value in own.items() if key.startswith(head)}
    sources.load_into(model, state, name=name)
