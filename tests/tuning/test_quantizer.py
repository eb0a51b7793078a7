# SPDX-License-Identifier: Apache-2.0
"""The 1-bit quantiser against a literal one: values, and gradients by its own chain rule."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tuning.quantizer import CODE, EPSILON, one_bit


def literally(weight: np.ndarray) -> np.ndarray:
    """One value after the other, in float64."""
    mean = float(np.mean(weight))
    deviation = float(np.std(weight, ddof=1))
    out = np.empty_like(weight, dtype=np.float64)
    for index in np.ndindex(*weight.shape):
        standard = (weight[index] - mean) / (deviation + 1e-5)
        out[index] = (0.6744897501960817 if standard >= 0 else -0.6744897501960817) * deviation
        out[index] += mean
    return out


@given(
    arrays(
        np.float64,
        st.tuples(st.integers(1, 5), st.integers(2, 6)),
        elements=st.integers(-8, 8).map(lambda k: k / 4),
    )
)
def test_values_equal_the_literal_quantiser(weight: np.ndarray) -> None:
    # In quarters, the mean of which float64 may miss by a rounding: leave those at it alone.
    clear = np.abs(weight - weight.mean()) > 1e-9
    found = one_bit(torch.from_numpy(weight)).numpy()
    np.testing.assert_allclose(found[clear], literally(weight)[clear], rtol=0, atol=1e-6)


def test_zero_counts_as_plus() -> None:
    weight = torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, -1.0]])
    assert float(weight.mean()) == 0.0
    deviation = weight.std()
    expected = torch.where(weight >= 0, CODE, -CODE) * deviation
    torch.testing.assert_close(one_bit(weight), expected, rtol=0, atol=1e-6)


def test_gradient_goes_straight_through_and_through_mean_and_deviation() -> None:
    """With s = (w - m) / (d + e) and the rounding q constant, out = (s + (q - s)) d + m, where the
    derivative of s is kept: d out = d ds + q dd + dm (s itself cancels in the value only)."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    seed = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    held = weight.clone().requires_grad_()
    (one_bit(held) * seed).sum().backward()

    n = weight.numel()
    mean, d = weight.mean(), weight.std()
    standard = (weight - mean) / (d + EPSILON)
    code = torch.where(standard >= 0, CODE, -CODE)
    d_mean = torch.full_like(weight, 1 / n)  # dm / dw
    d_std = (weight - mean) / (d * (n - 1))  # dd / dw
    jacobian = torch.zeros(n, n, dtype=torch.float64)
    for out in range(n):
        for into in range(n):
            same = 1.0 if out == into else 0.0
            d_s = (same - d_mean.flatten()[into]) / (d + EPSILON)
            d_s = d_s - standard.flatten()[out] / (d + EPSILON) * d_std.flatten()[into]
            jacobian[out, into] = (
                d * d_s + code.flatten()[out] * d_std.flatten()[into] + d_mean.flatten()[into]
            )
    expected = (seed.flatten() @ jacobian).reshape(4, 5)
    torch.testing.assert_close(held.grad, expected, rtol=0, atol=1e-10)
    # Neither plainly straight through, nor cut off from mean and deviation.
    assert held.grad is not None and (held.grad - seed).abs().max() > 1e-2


@pytest.mark.parametrize("factor", [1e-3, 1.0, 50.0])
def test_mean_and_spread_of_the_codes_follow_the_weights(factor: float) -> None:
    weight = factor * (torch.randn(64, 64, generator=torch.Generator().manual_seed(4)) + 2)
    used = one_bit(weight)
    values = torch.unique(used)
    assert float(used.std() / weight.std()) == pytest.approx(CODE, rel=0.01)
    assert float(used.mean()) == pytest.approx(float(weight.mean()), rel=0.02)
    assert float(values.max() - values.min()) == pytest.approx(
        2 * CODE * float(weight.std()), rel=1e-4
    )


def test_matrix_of_equal_values_stays_finite() -> None:
    weight = torch.full((3, 3), 0.25, requires_grad=True)
    used = one_bit(weight)
    torch.testing.assert_close(used.detach(), torch.full((3, 3), 0.25))
