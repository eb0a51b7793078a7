# SPDX-License-Identifier: Apache-2.0
"""A device's own data as model inputs, by the settings of the manifest.

Images are resized bilinearly with half-pixel centres and no antialiasing, which is
`torch.nn.functional.interpolate(mode="bilinear", align_corners=False)`: plain, and the same in
numpy on every device. Other arrays than a kind's own, such as "labels", pass as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np

from edge_runtime.errors import DataError
from protocol.manifest import Preprocessing

MASKED: Final = -10_000.0
"""Added to the attention score of a padding token: far below any score, finite in float16."""

_LUMA: Final = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as Pillow's "L"
_CHUNK_VALUES: Final = 1 << 20  # working memory of the resize, about 4 MiB an intermediate


def apply(preprocessing: Preprocessing, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Model inputs, and all other arrays of `arrays`.

    image: "images" uint8 `[n, h, w]` or `[n, h, w, c]` → "pixel_values" float32 `[n, C, S, S]`
    tokens: "input_ids" integer `[n, t]` and "attention_mask" `[n, t]` of 0 and 1 → "input_ids"
    int64 `[n, T]` and "attention_mask" float32 `[n, 1, 1, T]`, 0 to keep, MASKED for padding
    array: every floating array, as float32

    Raises: DataError for names, types, shapes or values that do not fit.
    """
    for fault in faults(preprocessing, arrays):
        raise DataError(fault)
    match preprocessing.kind:
        case "image":
            made = {"pixel_values": _images(preprocessing, arrays["images"])}
            rest = {name: array for name, array in arrays.items() if name != "images"}
        case "tokens":
            ids, mask = arrays["input_ids"], arrays["attention_mask"]
            made = _tokens(preprocessing.max_length, ids, mask)
            rest = {name: array for name, array in arrays.items() if name not in made}
        case "array":
            made = {}
            rest = {
                name: array.astype(np.float32) if array.dtype.kind == "f" else array
                for name, array in arrays.items()
            }
    return {**made, **rest}


def faults(preprocessing: Preprocessing, arrays: Mapping[str, np.ndarray]) -> Iterator[str]:
    """All that keeps `apply` from taking the arrays, a sentence each.

    What cannot be looked at because of another fault is left out.
    """
    yield from _row_faults(arrays)
    sound = {
        name: array
        for name, array in arrays.items()
        if isinstance(array, np.ndarray) and array.ndim > 0
    }
    needed: tuple[str, ...] = ()
    match preprocessing.kind:
        case "image":
            needed, made = ("images",), "pixel_values"
            if "images" in sound:
                yield from _image_faults(preprocessing, sound["images"])
            if made in arrays:
                yield f'"{made}": expected raw data, found an array named like a model input'
        case "tokens":
            needed = ("input_ids", "attention_mask")
            if sound.keys() >= set(needed):
                ids, mask = (sound[name] for name in needed)
                yield from _token_faults(preprocessing.max_length, ids, mask)
        case "array":
            for name, array in sound.items():
                yield from _float_faults(name, array)
    for name in needed if arrays else ():
        if name not in arrays:
            yield f'data: expected an array "{name}", found {", ".join(sorted(arrays))}'


def _row_faults(arrays: Mapping[str, np.ndarray]) -> Iterator[str]:
    if not arrays:
        yield "data: expected arrays by name, found none"
    lengths: dict[str, int] = {}
    for name, array in arrays.items():
        given: object = array
        if not isinstance(given, np.ndarray):
            yield f'"{name}": expected a numpy array, found a {type(given).__name__}'
        elif array.ndim == 0:
            yield f'"{name}": expected one row a sample, found a single value'
        else:
            lengths[name] = len(array)
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f'"{name}" {length}' for name, length in lengths.items())
        yield f"data: expected as many rows in every array, found {shown}"
    elif lengths and not any(lengths.values()):
        yield "data: expected one sample or more, found none"


def _float_faults(name: str, array: np.ndarray) -> Iterator[str]:
    if array.dtype.kind != "f":
        return
    if not np.isfinite(array).all():
        yield f'"{name}": expected finite values, found NaN or infinite ones'
        return
    with np.errstate(over="ignore"):  # that is what is looked for
        single = array.astype(np.float32, copy=False)
    if not np.isfinite(single).all():
        yield f'"{name}": expected values in the range of float32; scale them'


# Images


def _image_faults(settings: Preprocessing, images: np.ndarray) -> Iterator[str]:
    if images.dtype != np.uint8:
        yield (
            f'"images": expected uint8 values 0 to 255, found {images.dtype}; '
            "scale and convert them first"
        )
    shape = (*images.shape, 1) if images.ndim == 3 else images.shape
    # Without a row there is no sample, which is said elsewhere.
    if len(shape) != 4 or 0 in shape[1:]:
        yield (
            f'"images": expected [n, height, width] or [n, height, width, channels], '
            f"found {list(images.shape)}"
        )
        return
    allowed = {1, 3} if settings.channels == 1 else {1, settings.channels}
    if shape[3] not in allowed:
        expected = " or ".join(map(str, sorted(allowed)))
        yield f'"images": expected {expected} channels, found {shape[3]}'


def _images(settings: Preprocessing, images: np.ndarray) -> np.ndarray:
    if images.ndim == 3:
        images = images[..., None]
    n, height, width, channels = images.shape
    side = settings.size
    std = np.array(settings.std, np.float32)
    scale = (1 / (255 * std)).astype(np.float32)
    shift = (-np.array(settings.mean, np.float32) / std).astype(np.float32)
    out = np.empty((n, settings.channels, side, side), np.float32)
    per_image = max(height * width, side * side) * channels
    chunk = max(1, _CHUNK_VALUES // per_image)
    for start in range(0, n, chunk):
        block = images[start : start + chunk].astype(np.float32)
        if channels == 3 and settings.channels == 1:
            block = (block @ _LUMA)[..., None]
        block = _resize(block, side)  # [n, S, S, c]
        # one channel is repeated by broadcasting
        out[start : start + chunk] = (block * scale + shift).transpose(0, 3, 1, 2)
    return out


def _resize(block: np.ndarray, side: int) -> np.ndarray:
    """`[n, h, w, c]` to `[n, side, side, c]`, rows first, then columns."""
    _, height, width, _ = block.shape
    if height != side:
        low, high, part = _neighbours(height, side)
        part = part[:, None, None]
        block = block[:, low] * (1 - part) + block[:, high] * part
    if width != side:
        low, high, part = _neighbours(width, side)
        part = part[:, None]
        block = block[:, :, low] * (1 - part) + block[:, :, high] * part
    return block


def _neighbours(size: int, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each new pixel: the old ones on both sides, and the share of the upper one."""
    centre = (np.arange(side) + 0.5) * (size / side) - 0.5
    centre = np.clip(centre, 0, size - 1)
    low = np.floor(centre).astype(np.int64)
    high = np.minimum(low + 1, size - 1)
    return low, high, (centre - low).astype(np.float32)


# Tokens


def _token_faults(max_length: int, ids: np.ndarray, mask: np.ndarray) -> Iterator[str]:
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        yield f'"input_ids": expected integers [n, tokens], found {ids.dtype} {list(ids.shape)}'
        return
    if ids.size and int(ids.min()) < 0:
        yield f'"input_ids": expected 0 or more, found {ids.min()}'
    if mask.shape != ids.shape or mask.dtype.kind not in "biu":
        yield (
            f'"attention_mask": expected 0 and 1 in the shape of "input_ids" {list(ids.shape)}, '
            f"found {mask.dtype} {list(mask.shape)}"
        )
        return
    if mask.size and not (int(mask.min()) >= 0 and int(mask.max()) <= 1):
        yield f'"attention_mask": expected 0 and 1, found {mask.min()} to {mask.max()}'
    kept = min(max_length, ids.shape[1])
    empty = np.flatnonzero(~mask[:, :kept].astype(bool).any(axis=1))
    if empty.size:
        yield (
            f'"attention_mask": expected a token or more in every sample, found none in '
            f"{empty.size}, sample {empty[0]} first, within {kept} tokens; leave them out"
        )


def _tokens(max_length: int, ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    n = len(ids)
    kept = min(max_length, ids.shape[1])
    padded = np.zeros((n, max_length), np.int64)
    padded[:, :kept] = ids[:, :kept]
    additive = np.full((n, 1, 1, max_length), MASKED, np.float32)
    additive[:, 0, 0, :kept][mask[:, :kept].astype(bool)] = 0.0
    return {"input_ids": padded, "attention_mask": additive}
