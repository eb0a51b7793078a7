# SPDX-License-Identifier: Apache-2.0
"""Mergers, robust rules and server optimizers by the names that job files use: the one place where
names and classes meet, as `codecs.codec_named` is for codecs."""

from __future__ import annotations

from typing import Any, Final

from aggregation.errors import MergeError
from aggregation.mergers import (
    DARE,
    OPCM,
    TIES,
    Breadcrumbs,
    CountedPool,
    FedExLoRA,
    FedIT,
    FedSALoRA,
    FFALoRA,
    FlexLoRA,
    FLoRA,
    GreedySoup,
    HetLoRA,
    LiNeS,
    LoRAFair,
    Merger,
    RoLoRA,
    TaskArithmetic,
    UniformSoup,
    WeightedMean,
)
from aggregation.mergers.greedy_soup import Evaluate
from aggregation.naming import build, form
from aggregation.robust import (
    Bulyan,
    CentredClipping,
    CoordinateMedian,
    FoolsGold,
    GeometricMedian,
    Krum,
    MaskedGeometricMedian,
    MultiKrum,
    NormBound,
    TrimmedMean,
)
from aggregation.server_optimizers import (
    Averaging,
    FedAdagrad,
    FedAdam,
    FedAvgM,
    FedYogi,
    ServerOptimizer,
)
from protocol.factors import FactorPair

ROBUST: Final[dict[str, type[Merger[Any]]]] = {
    "norm-bound": NormBound,
    "median": CoordinateMedian,
    "trimmed-mean": TrimmedMean,
    "krum": Krum,
    "multi-krum": MultiKrum,
    "bulyan": Bulyan,
    "geometric-median": GeometricMedian,
    "masked-geometric-median": MaskedGeometricMedian,
    "centred-clipping": CentredClipping,
    "foolsgold": FoolsGold,
}
LOW_RANK: Final[dict[str, type[Merger[Any]]]] = {
    "fedit": FedIT,
    "ffa-lora": FFALoRA,
    "fedsa-lora": FedSALoRA,
    "rolora": RoLoRA,
    "flora": FLoRA,
    "flexlora": FlexLoRA,
    "fedex-lora": FedExLoRA,
    "lora-fair": LoRAFair,
    "hetlora": HetLoRA,
}
MERGERS: Final[dict[str, type[Merger[Any]]]] = {
    "weighted-mean": WeightedMean,
    "counted-pool": CountedPool,
    **LOW_RANK,
    "task-arithmetic": TaskArithmetic,
    "ties": TIES,
    "dare": DARE,
    "breadcrumbs": Breadcrumbs,
    "lines": LiNeS,
    "uniform-soup": UniformSoup,
    "greedy-soup": GreedySoup,
    "opcm": OPCM,
    **ROBUST,
}
SERVER_OPTIMIZERS: Final[dict[str, type[ServerOptimizer]]] = {
    "averaging": Averaging,
    "momentum": FedAvgM,
    "adam": FedAdam,
    "yogi": FedYogi,
    "adagrad": FedAdagrad,
}
_SOME_PAIR: Final = (FactorPair(down="down", up="up", scale=1.0),)


def merger_named(
    text: str, pairs: tuple[FactorPair, ...], evaluate: Evaluate | None = None
) -> Merger[Any]:
    """The merger that a job file names, for tensors among which are `pairs` of factors; `evaluate`
    gives an accuracy to choose by.

    Raises: MergeError for a name or setting that there is not, a low-rank merger without pairs, or
    a greedy soup without `evaluate`.
    """
    context = {"pairs": pairs, "evaluate": evaluate}
    return build("merger", MERGERS, text, MergeError, context=context)


def described_merger(text: str) -> Merger[Any]:
    """The merger that a job file names, to be looked at: its pairs and accuracies are made up.

    Raises: MergeError for a name or setting that there is not.
    """
    return merger_named(text, _SOME_PAIR, lambda tensors: 0.0)


def is_robust(merger: Merger[Any]) -> bool:
    """Whether it is a rule against clients that lie."""
    return isinstance(merger, tuple(ROBUST.values()))


def moves_base(merger: Merger[Any]) -> bool:
    """Whether it changes frozen weights, which is right only if its delta is applied as it is."""
    return isinstance(merger, FLoRA | FedExLoRA)


def mixes_ranks(merger: Merger[Any]) -> bool:
    """Whether updates of factors of smaller ranks than the spec's may be among the others."""
    return bool(getattr(merger, "mixed_ranks", False))


def needs_counts(merger: Merger[Any]) -> bool:
    """Whether updates have to say how often each element of a pool was selected."""
    return isinstance(merger, CountedPool)


def term_smoothing(merger: Merger[Any]) -> float:
    """ν of a rule for which clients make terms of their updates, around a centre that they are
    sent; 0 for others."""
    return merger.smoothing if isinstance(merger, MaskedGeometricMedian) else 0.0


def needs_accuracy(merger: Merger[Any]) -> bool:
    """Whether it chooses by an accuracy, on samples that nothing else is measured on."""
    return isinstance(merger, GreedySoup)


def fewest_updates(merger: Merger[Any]) -> int:
    """The updates without which a round of this merger gives nothing."""
    match merger:
        case Krum() | MultiKrum():
            return 2 * merger.byzantine + 3
        case Bulyan():
            return 4 * merger.byzantine + 3
        case _:
            return 1


def server_optimizer_named(
    text: str, *, learning_rate: float = 0.01, adaptivity: float = 1e-3
) -> ServerOptimizer:
    """The server optimizer that a job file names; rate and adaptivity have keys of their own there.

    Raises: MergeError for a name or setting that there is not.
    """
    own = {"learning_rate": learning_rate, "adaptivity": adaptivity}
    return build("server optimizer", SERVER_OPTIMIZERS, text, MergeError, context=own)


MERGER_FORMS: Final = tuple(
    form(name, kind, ("pairs", "evaluate")) for name, kind in MERGERS.items()
)
"""How each is written in a job file, settings included."""
SERVER_FORMS: Final = tuple(
    form(name, kind, ("learning_rate", "adaptivity")) for name, kind in SERVER_OPTIMIZERS.items()
)
"""As `MERGER_FORMS`."""
