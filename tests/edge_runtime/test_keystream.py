# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.keystream import Keystream, repeatable_keystream, secret_keystream


def test_words_are_those_of_rfc_8439() -> None:
    # Appendix A.1, test vectors 1 and 2: key, nonce 0; blocks 0 and 1.
    blocks = bytes.fromhex(
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
    )
    stream = Keystream(bytes(32))
    words = np.concatenate([stream.words(3), stream.words(0), stream.words(13)])
    assert words.astype("<u8").tobytes() == blocks


def test_key_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 32 bytes, found 16"):
        Keystream(bytes(16))


def test_secret_streams_differ_whatever_the_seed_and_repeatable_ones_do_not() -> None:
    assert secret_keystream(1).words(4).tobytes() != secret_keystream(1).words(4).tobytes()
    assert repeatable_keystream(1).words(4).tobytes() == repeatable_keystream(1).words(4).tobytes()
    assert repeatable_keystream(1).words(4).tobytes() != repeatable_keystream(2).words(4).tobytes()


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_normals_are_as_many_as_asked_for(count: int) -> None:
    values = repeatable_keystream(0).normals(count)
    assert values.dtype == np.float32
    assert values.shape == (count,)


def test_normals_are_normal_and_independent() -> None:
    from scipy import stats

    count = 400_000
    values = repeatable_keystream(7).normals(count).astype(np.float64)
    assert stats.kstest(values, "norm").pvalue > 1e-3
    # Five deviations of the estimate, each.
    assert abs(values.mean()) < 5 / count**0.5
    assert abs(values.std() - 1) < 5 / (2 * count) ** 0.5
    assert abs(stats.kurtosis(values)) < 5 * (24 / count) ** 0.5
    half = count // 2
    for lag in (1, 2, half):  # `half`: the two values that one pair of words gives
        assert abs(np.corrcoef(values[:-lag], values[lag:])[0, 1]) < 5 / (count - lag) ** 0.5


def test_largest_and_smallest_words_give_finite_values() -> None:
    class Extreme(Keystream):
        def words(self, count: int) -> np.ndarray:
            return np.array([0, 2**64 - 1, 0, 2**64 - 1], np.uint64)[:count]

    values = Extreme(bytes(32)).normals(4)
    assert np.isfinite(values).all()
    assert np.abs(values).max() < 9.5
