# SPDX-License-Identifier: Apache-2.0
"""Read IDX files, the format of MNIST and its relatives, plain or gzip-compressed.

*Layout*: two zero bytes, one byte for the element type, one byte for the number of dimensions,
each dimension as a big-endian uint32, then the elements in row-major order, big-endian.
"""

import gzip
import zlib
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

ELEMENT_TYPES: Final[Mapping[int, np.dtype[Any]]] = {
    0x08: np.dtype(np.uint8),
    0x09: np.dtype(np.int8),
    0x0B: np.dtype(">i2"),
    0x0C: np.dtype(">i4"),
    0x0D: np.dtype(">f4"),
    0x0E: np.dtype(">f8"),
}
MAX_DIMS = 4
READ_CHUNK_BYTES = 1 << 20

_Readable = IO[bytes] | gzip.GzipFile


class IdxFormatError(ValueError):
    """An IDX file whose bytes are not what its header, or the format, says."""


def read_idx(path: Path) -> np.ndarray:
    """Read one IDX file, compressed if its name ends in `.gz`.

    *Returns*: an array of the file's shape, in native byte order.
    *Raises*: `IdxFormatError` for a wrong magic number, too many dimensions, missing or
    surplus bytes, or a broken gzip stream; `FileNotFoundError` if there is no such file.
    *Cost*: the bytes that the file holds, or that its header announces, whichever are fewer,
    twice. A header that announces more than the file holds does not make it allocate that.
    """
    path = Path(path)
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as stream:
            return _read_stream(stream, path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise IdxFormatError(
            f"{path}: the gzip stream is cut short or damaged ({error}); get the file again"
        ) from error


def _read_stream(stream: _Readable, path: Path) -> np.ndarray:
    magic = _read_up_to(stream, 4)
    if len(magic) < 4:
        raise IdxFormatError(f"{path}: expected a magic number of 4 bytes, found {len(magic)}")
    if magic[:2] != b"\0\0" or magic[2] not in ELEMENT_TYPES:
        known = ", ".join(f"0x{code:02x}" for code in ELEMENT_TYPES)
        raise IdxFormatError(
            f"{path}: expected an IDX magic number, two zero bytes and an element type of "
            f"{known}; found {magic.hex(' ')}"
        )
    n_dims = magic[3]
    if not 1 <= n_dims <= MAX_DIMS:
        raise IdxFormatError(f"{path}: expected 1 to {MAX_DIMS} dimensions, found {n_dims}")
    header = _read_up_to(stream, 4 * n_dims)
    if len(header) < 4 * n_dims:
        raise IdxFormatError(
            f"{path}: expected {4 * n_dims} bytes of dimensions, found {len(header)}"
        )
    shape = tuple(int(size) for size in np.frombuffer(header, dtype=">u4"))
    dtype = ELEMENT_TYPES[magic[2]]
    expected = prod(shape) * dtype.itemsize  # Python integers: cannot overflow
    # One byte more than announced is enough to know that there is a surplus.
    data = _read_up_to(stream, expected + 1)
    if len(data) < expected:
        raise IdxFormatError(
            f"{path}: shape {list(shape)} of {dtype.name} needs {expected} bytes of data, "
            f"found {len(data)}; the file is truncated"
        )
    if len(data) > expected:
        raise IdxFormatError(
            f"{path}: shape {list(shape)} of {dtype.name} needs {expected} bytes of data, "
            f"found at least {len(data)}; the file has trailing bytes"
        )
    return np.frombuffer(data, dtype=dtype).reshape(shape).astype(dtype.newbyteorder("="))


def _read_up_to(stream: _Readable, limit: int) -> bytearray:
    """Read `limit` bytes, or what there is; grows with the data, not with the announcement."""
    data = bytearray()
    while len(data) < limit:
        chunk = stream.read(min(READ_CHUNK_BYTES, limit - len(data)))
        if not chunk:
            break
        data += chunk
    return data
