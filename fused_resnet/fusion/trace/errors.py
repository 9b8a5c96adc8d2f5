"""The exception of tracing: why a module is left unfused."""

from __future__ import annotations


class Untraceable(Exception):  # noqa: N818  (an outcome, not an error)
    """One trace cannot stand for every call of a module's forward; the message says why."""
