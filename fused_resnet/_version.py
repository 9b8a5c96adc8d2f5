"""The version, in the one place that setup and package both read."""

__version__ = "0.1.0"
