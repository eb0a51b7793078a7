# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from client_sdk.scaffold import next_control


@given(st.integers(1, 9), st.floats(0.01, 0.5), st.integers(0, 2**32 - 1))
def test_control_is_the_mean_gradient_of_the_steps(steps: int, rate: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    own, control, start = (rng.standard_normal(5).astype("f4") for _ in range(3))
    gradients = rng.standard_normal((steps, 5))
    trained = start.astype("f8")
    for gradient in gradients:  # algorithm 1, line 10
        trained = trained - rate * (gradient - own + control)
    found = next_control(
        {"a": own}, {"a": control}, {"a": start}, {"a": trained.astype("f4")},
        steps=steps, learning_rate=rate,
    )["a"]  # fmt: skip
    assert found.dtype == np.float32
    # What option II is for: what the corrections added goes out again.
    np.testing.assert_allclose(found, gradients.mean(axis=0), rtol=0, atol=2e-4)
