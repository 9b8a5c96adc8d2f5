"""Runs one mistake of toys.cu, for a build whose report ends the process.

``python toy_process.py LIBRARY NUMBER``
"""

from __future__ import annotations

import ctypes
import sys

BLOCKS = 2


def run(library: ctypes.CDLL, number: int) -> tuple[int, list[float]]:
    """CUDA's error, and what the kernel left."""
    # Arrays by malloc, so that AddressSanitizer knows where they end.
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    count = 64 * BLOCKS
    memory = [libc.malloc(ctypes.c_size_t(4 * count)) for _ in range(2)]
    values, out = ((ctypes.c_float * count).from_address(address) for address in memory)
    values[:] = [float(i % 37) for i in range(count)]
    out[:] = [0.0] * count
    error = library.toy_mistake(values, out, BLOCKS, number)
    result = list(out)
    for address in memory:
        libc.free(ctypes.c_void_p(address))
    return error, result


if __name__ == "__main__":
    run(ctypes.CDLL(sys.argv[1]), int(sys.argv[2]))
    print("no report")
