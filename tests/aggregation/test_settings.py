# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from aggregation.errors import MergeError
from aggregation.settings import require_integer, require_number


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, "1", None, True, 1 + 0j, [1]])
def test_what_is_no_finite_number_is_refused(value):
    with pytest.raises(MergeError, match="share: expected a number, found"):
        require_number("share", value, "a number")


def test_a_number_for_which_the_condition_does_not_hold_is_refused():
    require_number("share", 0.2, "below 0.5", lambda x: x < 0.5)
    with pytest.raises(MergeError, match=r"share: expected below 0\.5, found 0\.5"):
        require_number("share", 0.5, "below 0.5", lambda x: x < 0.5)


@pytest.mark.parametrize("value", [1, 2.0, "2", None, True, np.nan])
def test_what_is_no_integer_or_too_low_is_refused(value):
    with pytest.raises(MergeError, match="count: expected an integer of 2 or above"):
        require_integer("count", value, 2)
    require_integer("count", 2, 2)
