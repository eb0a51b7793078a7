# SPDX-License-Identifier: Apache-2.0
"""Train every weight of the backbone: what the light methods are measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tuning.methods.head import as_it_is
from tuning.methods.method import Tuned

if TYPE_CHECKING:
    from tuning.backbones import Backbone


@dataclass(frozen=True, slots=True, kw_only=True)
class Full:
    """Full fine-tuning (FedAvg of whole models, McMahan et al. 2017, arXiv 1602.05629)."""

    name: ClassVar[str] = "full"
    mean_is_exact: ClassVar[bool] = True

    def attach(self, backbone: Backbone, *, seed: int) -> Tuned:
        """Name every parameter as trained."""
        names = {name: name for name, _ in backbone.model.named_parameters()}
        return Tuned(module=backbone.model, trainable=names, fold=as_it_is)
