"""The simulator's tests of conv_bn_add_relu, on the device: see device.py."""

from test_conv_bn_add_relu import *  # noqa: F403

# Its expectations are those of a device of eight multiprocessors.
del test_the_host_plans_small_tiles_and_splits_for_small_maps  # noqa: F821
