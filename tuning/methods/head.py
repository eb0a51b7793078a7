# SPDX-License-Identifier: Apache-2.0
"""Train the classification layer alone, on frozen features: the linear probe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tuning.methods.method import Tuned, classifier_parameters

if TYPE_CHECKING:
    from torch import nn

    from tuning.backbones import Backbone


def as_it_is(module: nn.Module) -> nn.Module:
    """Fold of a method whose tensors are the backbone's own: nothing to merge."""
    return module


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Linear probe. The logits are linear in what is trained, so the plain mean is exact."""

    name: ClassVar[str] = "head"
    mean_is_exact: ClassVar[bool] = True

    def attach(self, backbone: Backbone, *, seed: int) -> Tuned:
        """The classifier was drawn when the backbone was loaded; nothing is added."""
        return Tuned(
            module=backbone.model, trainable=classifier_parameters(backbone), fold=as_it_is
        )
