# SPDX-License-Identifier: Apache-2.0
"""LAME beside its formula, written out with loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime import lame
from edge_runtime.errors import DataError
from edge_runtime.lame import corrected, nearest, softmax


def drawn(seed: int, samples: int, classes: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((samples, classes)).astype(np.float32)
    return softmax(2 * scores), rng.standard_normal((samples, width)).astype(np.float32)


def affinities(features: np.ndarray, neighbours: int) -> list[list[float]]:
    """w_ij of the module's docstring, made symmetric."""
    n = len(features)
    near = [[0.0] * n for _ in range(n)]
    for i in range(n):
        cosine = {
            j: float(features[i] @ features[j])
            / float(np.linalg.norm(features[i]) * np.linalg.norm(features[j]))
            for j in range(n)
            if j != i
        }
        for j in sorted(cosine, key=lambda j: (-cosine[j], j))[:neighbours]:
            near[i][j] = 1.0
    return [[(near[i][j] + near[j][i]) / 2 for j in range(n)] for i in range(n)]


def literally(q: np.ndarray, w: list[list[float]]) -> np.ndarray:
    """z_i <- softmax(log q_i + sum_j w_ij z_j), one value after the other."""
    n, classes = q.shape
    z = [[float(value) for value in row] for row in q]
    for _ in range(100):
        new = []
        for i in range(n):
            powers = []
            for c in range(classes):
                drift = sum(w[i][j] * z[j][c] for j in range(n))
                powers.append(math.exp(math.log(float(q[i, c]) + lame.SMALLEST) + drift))
            new.append([power / sum(powers) for power in powers])
        moved = max(abs(a - b) for x, y in zip(new, z, strict=True) for a, b in zip(x, y))  # noqa: B905
        z = new
        if moved <= lame.CHANGE:
            break
    return np.array(z)


def objective(z: np.ndarray, q: np.ndarray, w: np.ndarray) -> float:
    divergence = float((z * (np.log(z + 1e-30) - np.log(q + lame.SMALLEST))).sum())
    return divergence - float((w * (z @ z.T)).sum()) / 2


@pytest.mark.parametrize(("samples", "neighbours"), [(2, 5), (9, 1), (12, 3), (12, 5)])
def test_corrected_equals_the_formula(samples: int, neighbours: int) -> None:
    q, features = drawn(samples, samples, 4, 6)
    found = corrected(q, features, neighbours=neighbours)
    expected = literally(q, affinities(features.astype(np.float64), neighbours))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert found.dtype == np.float32


@given(st.integers(0, 10_000), st.integers(2, 30), st.integers(2, 6))
def test_correction_lowers_the_objective_and_keeps_rows_distributions(
    seed: int, samples: int, classes: int
) -> None:
    q, features = drawn(seed, samples, classes, 5)
    before = q.copy(), features.copy()
    found = corrected(q, features).astype(np.float64)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=0, atol=1e-5)
    w = np.array(affinities(features.astype(np.float64), min(lame.NEIGHBOURS, samples - 1)))
    # The step's fixed point counts each pair once.
    assert objective(found, q, w) <= objective(q.astype(np.float64), q, w) + 1e-4
    np.testing.assert_array_equal(before[0], q)
    np.testing.assert_array_equal(before[1], features)


def test_an_outlier_is_taken_for_what_its_neighbours_are() -> None:
    rng = np.random.default_rng(0)
    centres = np.array([[10.0, 0.0], [0.0, 10.0]])
    labels = np.arange(20) % 2
    features = centres[labels] + rng.standard_normal((20, 2))
    q = np.where(np.arange(2) == labels[:, None], 0.9, 0.1)
    q[3] = [0.6, 0.4]
    found = corrected(q, features)
    assert q[3].argmax() == 0 and labels[3] == 1
    np.testing.assert_array_equal(found.argmax(axis=1), labels)


def test_one_sample_stays_as_it_is() -> None:
    q, features = drawn(1, 1, 5, 3)
    np.testing.assert_allclose(corrected(q, features), q, rtol=0, atol=1e-6)


def test_neighbours_are_found_in_blocks_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, features = drawn(3, 23, 2, 4)
    whole = nearest(features, 4)
    monkeypatch.setattr(lame, "_BLOCK", 50)
    np.testing.assert_array_equal(nearest(features, 4), whole)
    assert not (whole == np.arange(23)[:, None]).any()


def test_features_of_zeros_and_certain_probabilities_give_numbers() -> None:
    q = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    found = corrected(q, np.zeros((3, 4)))
    assert np.isfinite(found).all()


@pytest.mark.parametrize(
    ("q", "features", "neighbours", "words"),
    [
        (np.ones((3, 2)), np.ones((2, 4)), 5, r"found \[3, 2\] and \[2, 4\]"),
        (np.ones(3), np.ones((3, 4)), 5, r"found \[3\]"),
        (np.ones((3, 2)), np.full((3, 4), np.nan), 5, "found NaN"),
        (np.ones((3, 2)), np.ones((3, 4)), 0, "1 neighbour or more, found 0"),
    ],
)
def test_what_does_not_fit_is_refused(
    q: np.ndarray, features: np.ndarray, neighbours: int, words: str
) -> None:
    with pytest.raises(DataError, match=words):
        corrected(q, features, neighbours=neighbours)
