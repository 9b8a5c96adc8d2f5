"""Options of the command made from the settings of a training run."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..training.settings import Settings, kind_of


def add(
    parser: argparse.ArgumentParser, names: Iterable[str], defaults: Mapping[str, Any] | None = None
) -> None:
    """Add an option for each setting; one that is not given leaves no attribute.

    Args:
        parser: Parser of the subcommand.
        names: Names of the settings.
        defaults: Defaults of this subcommand where they are not those of :class:`Settings`; None
            for none.
    """
    fields = {f.name: f for f in dataclasses.fields(Settings)}
    for name in names:
        meta, flag = fields[name].metadata, f"--{name.replace('_', '-')}"
        text = meta["help"]
        if defaults and name in defaults:
            text = re.sub(r"\(default: .*\)", f"(default: {defaults[name]})", text)
        common: dict[str, Any] = {
            "dest": name,
            "default": argparse.SUPPRESS,
            "help": text.replace("%", "%%"),
        }
        kind, _ = kind_of(name)
        if kind is not bool:
            words = {int: "N", float: "X", tuple: "X,...", str: name.upper()}
            if "choices" in meta:
                words[str] = "|".join(meta["choices"])
            parser.add_argument(
                flag, type=_reader(kind), metavar=meta.get("metavar", words[kind]), **common
            )
        elif "on" in meta:
            off = meta.get("off", f"--no-{name.replace('_', '-')}")
            pair = parser.add_mutually_exclusive_group()
            pair.add_argument(meta["on"], action="store_true", **common)
            common["help"] = f"not {meta['on']}"
            pair.add_argument(off, action="store_false", **common)
        else:
            parser.add_argument(flag, action="store_true", **common)


def explicit_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that were typed.

    Args:
        arguments: Parsed command-line arguments of the subcommand.
    """
    typed = {f.name: getattr(arguments, f.name, None) for f in dataclasses.fields(Settings)}
    return {name: value for name, value in typed.items() if value is not None}


def _reader(kind: type) -> Any:
    """An argparse type: a number as it is typed; its range is checked with all other settings."""
    if kind is tuple:
        return lambda text: tuple(_number(part, float) for part in text.split(",") if part)
    if kind in (int, float):
        return lambda text: _number(text, kind)
    return str


def _number(text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        word = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"expected {word}, got {text!r}") from None
