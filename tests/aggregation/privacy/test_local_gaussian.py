# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from aggregation.errors import PrivacyError
from aggregation.privacy.analytic_gaussian import gaussian_delta
from aggregation.privacy.gaussian import Noise
from aggregation.privacy.local_gaussian import local_multiplier, privatised

SEED = bytes(range(32))


def test_an_update_is_clipped_and_noised_for_two_updates_that_are_twice_the_norm_apart():
    delta_of = {"a": np.full(20_000, 5, "f4"), "b": np.zeros((100, 100), "f4")}
    multiplier = local_multiplier(4.0, 1e-5)
    found = privatised(delta_of, Noise(clip=2.0, multiplier=multiplier), seed=SEED)
    # From one end of the ball to the other is two norms: half the multiplier is what counts.
    assert gaussian_delta(multiplier / 2, 4.0) <= 1e-5
    assert gaussian_delta(multiplier / 2 * 0.999, 4.0) > 1e-5
    assert found["b"].std() == pytest.approx(2.0 * multiplier, rel=0.03)
    assert {name: (value.shape, value.dtype) for name, value in found.items()} == {
        name: (value.shape, value.dtype) for name, value in delta_of.items()
    }
    # what is left of the update itself is of norm 2: far below its own noise
    assert abs(found["a"].mean() - 2.0 / np.sqrt(20_000)) < 4 * 2.0 * multiplier / np.sqrt(20_000)


def test_the_seed_decides_the_noise():
    delta_of = {"a": np.zeros(50, "f4")}
    noise = Noise(clip=1.0, multiplier=1.0)
    first, again = (privatised(delta_of, noise, seed=SEED) for _ in range(2))
    other = privatised(delta_of, noise, seed=bytes(32))
    assert np.array_equal(first["a"], again["a"])
    assert not (first["a"] == other["a"]).any()


def test_nothing_is_released_without_a_guarantee():
    for settings in ({"epsilon": 0.0, "delta": 1e-5}, {"epsilon": 1.0, "delta": 0.0}):
        with pytest.raises(PrivacyError):
            local_multiplier(**settings)
    with pytest.raises(PrivacyError, match="finite"):
        nan = {"a": np.array([np.nan], "f4")}
        privatised(nan, Noise(clip=1.0, multiplier=1.0), seed=SEED)
