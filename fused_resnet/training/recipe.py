"""Recipes: files of settings in YAML or TOML, and the ones that are shipped."""

from __future__ import annotations

import dataclasses
import platform
import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..models.optional import library
from ..tuning import processor
from ..tuning.atomic_file import replacing
from .settings import Settings

#: Names of the shipped recipes.
SHIPPED = tuple(
    sorted(
        path.name.removesuffix(".yaml")
        for path in (resources.files(__package__) / "recipes").iterdir()
        if path.name.endswith(".yaml")
    )
)


def read(source: str) -> dict[str, Any]:
    """The settings of a recipe.

    Args:
        source: The name of a shipped recipe, or the path of a ``.yaml``, ``.yml`` or ``.toml``
            file.

    Returns:
        The settings by their names; :func:`fused_resnet.training.from_mapping` checks them.

    Raises:
        ValueError: There is no such file or recipe, or it is not a table of settings.
        MissingPackageError: PyYAML (or before Python 3.11 tomli) is not installed.
    """
    if source in SHIPPED:
        text = (resources.files(__package__) / "recipes" / f"{source}.yaml").read_text()
        return _mapping(source, _yaml(source, text))
    path = Path(source)
    if path.suffix not in (".yaml", ".yml", ".toml"):
        raise ValueError(
            f"recipe {source!r}: expected a .yaml or .toml file, or one of {', '.join(SHIPPED)}"
        )
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not text"
        raise ValueError(f"recipe {source!r}: {why}") from None
    return _mapping(source, (_toml if path.suffix == ".toml" else _yaml)(source, text))


def write(path: Path, settings: Settings, facts: Mapping[str, Any]) -> None:
    """Write what a run was started with, in a form that :func:`read` takes.

    Args:
        path: The file.
        settings: All settings.
        facts: Further facts about the run, written under ``run``: versions, device, classes.
    """
    values = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(settings).items()
        if key != "resume" and value is not None
    }
    text = library("yaml", "train").safe_dump({**values, "run": dict(facts)}, sort_keys=False)
    with replacing(path) as part:
        part.write_text(text)


def environment() -> dict[str, Any]:
    """Versions and device, for ``RUN/recipe.yaml``."""
    torchvision = library("torchvision", "train")
    return {
        "versions": {
            "fused_resnet": __version__,
            "torch": str(torch.__version__),
            "torchvision": str(torchvision.__version__),
            "python": platform.python_version(),
        },
        "processor": processor.name(),
        "threads": torch.get_num_threads(),
    }


def _yaml(source: str, text: str) -> Any:
    yaml = library("yaml", "train")
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {source!r}: {' '.join(str(error).split())}") from None


def _toml(source: str, text: str) -> Any:
    tomllib = library("tomllib" if sys.version_info >= (3, 11) else "tomli", "train")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"recipe {source!r}: {error}") from None


def _mapping(source: str, found: Any) -> dict[str, Any]:
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ValueError(f"recipe {source!r}: expected a table of settings")
    return {key: value for key, value in found.items() if key != "run"}
