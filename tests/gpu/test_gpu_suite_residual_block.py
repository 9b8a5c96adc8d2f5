"""The simulator's tests of residual_block, on the device: see device.py."""

from test_residual_block import *  # noqa: F403
