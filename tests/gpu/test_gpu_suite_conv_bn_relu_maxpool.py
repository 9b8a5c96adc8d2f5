"""The simulator's tests of conv_bn_relu_maxpool, on the device: see device.py."""

from test_conv_bn_relu_maxpool import *  # noqa: F403
