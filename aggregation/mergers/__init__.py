# SPDX-License-Identifier: Apache-2.0
"""How many clients' tensors become one set: one file a rule, all behind the `Merger` protocol. A
merger takes updates one by one; mean-type rules keep no update, so that their memory does not grow
with the number of clients, and those that must see all of them keep them on disk beyond a budget.
Each says of itself whether sums are all that it needs, whether its mean is exact and whether the
order of updates matters, and the coordinator refuses combinations that these rule out."""

from __future__ import annotations

from aggregation.mergers.breadcrumbs import Breadcrumbs
from aggregation.mergers.counted_pool import COUNTS, CountedPool
from aggregation.mergers.dare import DARE
from aggregation.mergers.fedex_lora import FedExLoRA
from aggregation.mergers.fedit import FedIT
from aggregation.mergers.fedsa_lora import FedSALoRA
from aggregation.mergers.ffa_lora import FFALoRA
from aggregation.mergers.flexlora import FlexLoRA
from aggregation.mergers.flora import FLoRA
from aggregation.mergers.greedy_soup import GreedySoup, greedy_soup
from aggregation.mergers.hetlora import HetLoRA
from aggregation.mergers.lines import LiNeS
from aggregation.mergers.lora_fair import LoRAFair
from aggregation.mergers.lora_sb import CoreTriple, LoRASB
from aggregation.mergers.merger import BaseChange, Merged, Merger
from aggregation.mergers.opcm import OPCM
from aggregation.mergers.roles import ALL, ONE_FACTOR, Roles, roles_of
from aggregation.mergers.rolora import RoLoRA
from aggregation.mergers.task_arithmetic import TaskArithmetic
from aggregation.mergers.ties import TIES
from aggregation.mergers.uniform_soup import UniformSoup
from aggregation.mergers.weighted_mean import MeanState, WeightedMean

__all__ = [
    "ALL",
    "DARE",
    "ONE_FACTOR",
    "OPCM",
    "TIES",
    "COUNTS",
    "BaseChange",
    "Breadcrumbs",
    "CoreTriple",
    "CountedPool",
    "FFALoRA",
    "FLoRA",
    "FedExLoRA",
    "FedIT",
    "FedSALoRA",
    "FlexLoRA",
    "GreedySoup",
    "HetLoRA",
    "LiNeS",
    "LoRAFair",
    "LoRASB",
    "MeanState",
    "Merged",
    "Merger",
    "RoLoRA",
    "Roles",
    "TaskArithmetic",
    "UniformSoup",
    "WeightedMean",
    "greedy_soup",
    "roles_of",
]
