# SPDX-License-Identifier: Apache-2.0
"""SCAFFOLD's control variates on the wire: a second tensor beside every trainable one. The centre
of a masked geometric median travels down in the same way, and nothing of it up.

Server and clients each keep an estimate of the gradient a tensor, c and c_i. The server sends c
with the tensors, and a client answers with the change of c_i beside the change of the tensors.

*Source* Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
ICML 2020 (arXiv 1910.06378), algorithm 1, option II.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from protocol.tensors import ParamSpec, Tensors

PREFIX: Final = "control/"


def with_controls(spec: ParamSpec) -> ParamSpec:
    """A spec with a control of the same shape and type for every tensor."""
    controls = tuple((PREFIX + name, entry) for name, entry in spec.entries)
    return ParamSpec(tuple(sorted((*spec.entries, *controls))))


def without_controls(spec: ParamSpec) -> ParamSpec:
    """The inverse of `with_controls`."""
    return ParamSpec(tuple(entry for entry in spec.entries if not entry[0].startswith(PREFIX)))


def joined(tensors: Tensors, controls: Tensors) -> dict[str, np.ndarray]:
    """Tensors and their controls in one mapping."""
    return {**tensors, **{PREFIX + name: value for name, value in controls.items()}}


def parted(tensors: Tensors) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The inverse of `joined`: tensors, and the controls by their tensors' names."""
    plain = {name: value for name, value in tensors.items() if not name.startswith(PREFIX)}
    controls = {
        name.removeprefix(PREFIX): value
        for name, value in tensors.items()
        if name.startswith(PREFIX)
    }
    return plain, controls
