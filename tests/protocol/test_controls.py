# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np

from protocol.controls import joined, parted, with_controls, without_controls
from protocol.tensors import ParamSpec

TENSORS = {"a": np.ones((2, 3), np.float32), "z": np.zeros(4, np.float32)}


def test_every_tensor_has_a_control_of_its_shape() -> None:
    spec = ParamSpec.of(TENSORS)
    both = with_controls(spec)
    assert both.names == ("a", "control/a", "control/z", "z")
    assert both["control/a"] == spec["a"] and both["control/z"] == spec["z"]
    assert without_controls(both) == spec == without_controls(spec)


def test_tensors_and_controls_come_apart_as_they_were_joined() -> None:
    controls = {name: value + 1 for name, value in TENSORS.items()}
    both = joined(TENSORS, controls)
    assert with_controls(ParamSpec.of(TENSORS)).mismatch(both) is None
    tensors, found = parted(both)
    assert tensors.keys() == TENSORS.keys() and found.keys() == controls.keys()
    assert all(tensors[n] is TENSORS[n] and found[n] is controls[n] for n in TENSORS)
    assert parted(TENSORS)[1] == {}
