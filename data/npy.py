"""NumPy's files of one array: headers read by NumPy, and the bytes after them counted."""

from __future__ import annotations

import math
from typing import BinaryIO

import numpy as np

MAGIC = np.lib.format.MAGIC_PREFIX


def header(file: BinaryIO, size: int) -> tuple[np.dtype, tuple[int, ...], int]:
    """dtype, shape and first byte of the data of an array in a file of `size` bytes, which must end with the data.

    NumPy reads 10,000 bytes of a header at most. Raises ValueError for any other file.
    """
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise ValueError(
            f"version {'.'.join(map(str, version))} of NumPy's format, which arrays of numbers do not need"
        )
    try:
        shape, _, dtype = readers[version](file)
    except Exception as error:  # its parsers of Python literals raise different errors
        raise ValueError(f"its header is garbled or cut short: {str(error).partition(chr(10))[0]}") from error
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are never unpickled")
    if any(length < 0 for length in shape):
        raise ValueError(f"its header has the shape {shape}")
    begin = file.tell()
    end = begin + math.prod(shape) * dtype.itemsize
    if end != size:
        what = "it is cut short" if end > size else f"{size - end} bytes follow the array"
        raise ValueError(f"its header ends the array at byte {end}, and it has {size} bytes: {what}")
    return dtype, shape, begin
