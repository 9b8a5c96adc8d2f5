"""Shortcuts that CUDA's convolution adds in the same sum, in its large tiles."""

from __future__ import annotations

import pytest
from block_operands import Block
from precisions import precisions


@precisions
@pytest.mark.parametrize(("width", "tile"), [(128, "Tile<128, 128"), (64, "Tile<128, 64")])
def test_the_shortcut_in_large_tiles(simt, precision, width, tile):
    """A map that is large for the simulator's few multiprocessors."""
    block = Block(precision, 16, [16, 16, width], 1, shortcut=True)
    x = block.input(1, 64, 64)
    result = block.run(simt, x, concatenate=True)
    assert tile in simt.launches()[-1].kernel
    block.fold_scales()
    block.check(result, x)
