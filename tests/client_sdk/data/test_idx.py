# SPDX-License-Identifier: Apache-2.0
import gzip
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client_sdk.data.idx import IdxFormatError, read_idx


def idx_bytes(array: np.ndarray, code: int = 0x08) -> bytes:
    header = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


IMAGES = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    path = tmp_path / "images-idx3-ubyte"
    path.write_bytes(idx_bytes(IMAGES))
    return path


def test_read_idx_when_plain(plain: Path) -> None:
    result = read_idx(plain)
    np.testing.assert_array_equal(result, IMAGES)
    assert result.dtype == np.uint8
    result[0] = 0  # the caller owns it


def test_read_idx_when_gzipped(tmp_path: Path) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(idx_bytes(IMAGES)))
    np.testing.assert_array_equal(read_idx(path), IMAGES)


@pytest.mark.parametrize(
    ("code", "stored"), [(0x09, "i1"), (0x0B, ">i2"), (0x0C, ">i4"), (0x0D, ">f4"), (0x0E, ">f8")]
)
def test_read_idx_gives_native_order_when_elements_are_wide(
    tmp_path: Path, code: int, stored: str
) -> None:
    path = tmp_path / "numbers"
    path.write_bytes(idx_bytes(np.array([-3, 0, 100], dtype=stored), code))
    result = read_idx(path)
    assert result.tolist() == [-3, 0, 100]
    assert result.dtype.isnative


def test_read_idx_when_empty_array(tmp_path: Path) -> None:
    path = tmp_path / "none"
    path.write_bytes(idx_bytes(np.zeros((0, 28, 28), np.uint8)))
    assert read_idx(path).shape == (0, 28, 28)


def test_error_names_file_and_counts_when_truncated(plain: Path) -> None:
    plain.write_bytes(plain.read_bytes()[:-5])
    with pytest.raises(IdxFormatError, match=r"images-idx3-ubyte.*needs 24 bytes.*found 19"):
        read_idx(plain)


def test_error_names_file_and_counts_when_bytes_trail(plain: Path) -> None:
    plain.write_bytes(plain.read_bytes() + b"xyz")
    with pytest.raises(IdxFormatError, match=r"images-idx3-ubyte.*24 bytes.*at least 25.*trail"):
        read_idx(plain)


@pytest.mark.parametrize("length", range(16))
def test_error_is_raised_when_header_is_cut(plain: Path, length: int) -> None:
    plain.write_bytes(plain.read_bytes()[:length])
    with pytest.raises(IdxFormatError, match="expected"):
        read_idx(plain)


@pytest.mark.parametrize("magic", [b"\1\0\x08\3", b"\0\1\x08\3", b"\0\0\x07\3", b"\x1f\x8b\x08\0"])
def test_error_shows_what_came_when_magic_is_wrong(plain: Path, magic: bytes) -> None:
    plain.write_bytes(magic + plain.read_bytes()[4:])
    with pytest.raises(IdxFormatError, match=magic.hex(" ")):
        read_idx(plain)


@pytest.mark.parametrize("n_dims", [0, 5, 255])
def test_error_is_raised_when_dimensions_are_too_many_or_none(plain: Path, n_dims: int) -> None:
    data = bytearray(plain.read_bytes())
    data[3] = n_dims
    plain.write_bytes(data)
    with pytest.raises(IdxFormatError, match=f"found {n_dims}"):
        read_idx(plain)


def test_memory_is_bounded_by_the_file_when_header_announces_terabytes(tmp_path: Path) -> None:
    path = tmp_path / "liar"
    path.write_bytes(b"\0\0\x08\3" + struct.pack(">3I", *[2**32 - 1] * 3) + b"abc")
    tracemalloc.start()
    with pytest.raises(IdxFormatError, match="found 3"):
        read_idx(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_memory_is_bounded_when_a_compressed_bomb_trails(tmp_path: Path) -> None:
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(idx_bytes(IMAGES) + bytes(50 << 20)))
    tracemalloc.start()
    with pytest.raises(IdxFormatError, match="trailing"):
        read_idx(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_error_is_ours_when_gzip_is_cut_or_damaged(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    whole = gzip.compress(idx_bytes(noise))
    path = tmp_path / "images.gz"
    for damaged in (whole[:-10], whole[: len(whole) // 2], whole[:5], b"no gzip at all"):
        path.write_bytes(damaged)
        with pytest.raises(IdxFormatError, match=r"images\.gz"):
            read_idx(path)
    flipped = bytearray(whole)
    flipped[len(flipped) // 2] ^= 0xFF
    path.write_bytes(flipped)
    with pytest.raises(IdxFormatError, match=r"images\.gz"):
        read_idx(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_idx(tmp_path / "nowhere")


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=64))
def test_any_bytes_give_an_array_or_our_error(
    data: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any-bytes"
    path.write_bytes(data)
    try:
        result = read_idx(path)
    except IdxFormatError:
        return
    assert result.nbytes + 4 + 4 * result.ndim == len(data)
