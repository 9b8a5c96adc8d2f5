"""The one error of swapping: a module that is to be left, and why."""

from __future__ import annotations


class Untraceable(Exception):  # noqa: N818  (a verdict, not a fault)
    """What a module's forward does cannot be known from one trace; the message says why."""
