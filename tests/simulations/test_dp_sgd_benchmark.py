# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace

import pytest

from simulations.benchmarks import dp_sgd


@pytest.mark.long
def test_parity_is_of_steps_that_move_the_shipped_network() -> None:
    found = dp_sgd.dp_sgd_parity({"classifier": ("head", {}, dp_sgd.SGD)})
    assert (found.name, found.target) == ("dp_sgd_parity", "<= 1e-5")
    assert found.holds
    assert 0 <= found.value < 1e-5
    assert "classifier: " in found.note


def test_parity_fails_where_the_compiled_step_clips_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    literal = dp_sgd.literal_steps

    def clipped_less(tuned, spec, start, calls):  # type: ignore[no-untyped-def]
        privacy = replace(spec.privacy, clip=1.01 * spec.privacy.clip)
        return literal(tuned, replace(spec, privacy=privacy), start, calls)

    monkeypatch.setattr(dp_sgd, "literal_steps", clipped_less)
    found = dp_sgd.dp_sgd_parity({"classifier": ("head", {}, dp_sgd.SGD)})
    assert found.holds is False


@pytest.mark.long
def test_cost_is_a_ratio_of_times() -> None:
    (found,) = dp_sgd.dp_sgd_cost({"classifier": ("head", {}, dp_sgd.SGD)})
    assert found.name == "dp_sgd_step_ratio_head"
    assert found.value > 0
    assert "plain" in found.note
