"""The simulator's tests of bn_add_relu, on the device: see device.py."""

from test_bn_add_relu import *  # noqa: F403
