# SPDX-License-Identifier: Apache-2.0
"""Mergers, robust rules and server optimizers by the names that job files use: the one place where
names and classes meet, as `codecs.codec_named` is for codecs."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from aggregation.errors import MergeError
from aggregation.mergers import (
    DARE,
    OPCM,
    TIES,
    Breadcrumbs,
    FedIT,
    FedSALoRA,
    FFALoRA,
    FlexLoRA,
    HetLoRA,
    LiNeS,
    LoRAFair,
    Merger,
    RoLoRA,
    TaskArithmetic,
    UniformSoup,
    WeightedMean,
)
from aggregation.naming import build, form, settings
from aggregation.robust import (
    Bulyan,
    CentredClipping,
    CoordinateMedian,
    FoolsGold,
    GeometricMedian,
    Krum,
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
    "centred-clipping": CentredClipping,
    "foolsgold": FoolsGold,
}
LOW_RANK: Final[dict[str, type[Merger[Any]]]] = {
    "fedit": FedIT,
    "ffa-lora": FFALoRA,
    "fedsa-lora": FedSALoRA,
    "rolora": RoLoRA,
    "flexlora": FlexLoRA,
    "lora-fair": LoRAFair,
    "hetlora": HetLoRA,
}
MERGERS: Final[dict[str, type[Merger[Any]]]] = {
    "weighted-mean": WeightedMean,
    **LOW_RANK,
    "task-arithmetic": TaskArithmetic,
    "ties": TIES,
    "dare": DARE,
    "breadcrumbs": Breadcrumbs,
    "lines": LiNeS,
    "uniform-soup": UniformSoup,
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
# Set by keys of their own in a job file.
_OWN_KEYS: Final = ("learning_rate", "adaptivity")
_SOME_PAIR: Final = (FactorPair(down="down", up="up", scale=1.0),)


def merger_named(text: str, pairs: tuple[FactorPair, ...] = _SOME_PAIR) -> Merger[Any]:
    """The merger that a job file names, for tensors among which are `pairs` of factors.

    Raises: MergeError for a name or setting that there is not, or a low-rank merger without pairs.
    """
    return build("merger", MERGERS, text, MergeError, context={"pairs": pairs})


def fewest_updates(merger: Merger[Any]) -> int:
    """The updates without which a round of this merger gives nothing."""
    match merger:
        case Krum() | MultiKrum():
            return 2 * merger.byzantine + 3
        case Bulyan():
            return 4 * merger.byzantine + 3
        case _:
            return 1


def server_optimizer_named(text: str, **own: float) -> ServerOptimizer:
    """The server optimizer that a job file names; `own`: learning_rate and adaptivity.

    Raises: MergeError for a name or setting that there is not, or one that `own` gives.
    """
    name = text.partition(":")[0]
    if name in SERVER_OPTIMIZERS:
        words = text.partition(":")[2].replace(" ", "")
        known = {field.name for field in settings(SERVER_OPTIMIZERS[name])}
        for key in _OWN_KEYS:
            if f"{key}=" in words:
                raise MergeError(f"server optimizer: {key} has a key of its own, found {text!r}")
        if words and any("=" not in word for word in words.split(",") if word not in known):
            raise MergeError(f"server optimizer: expected settings by name, found {text!r}")
    optimizer = build("server optimizer", SERVER_OPTIMIZERS, text, MergeError)
    fields = {field.name for field in settings(type(optimizer))}
    given: dict[str, Any] = {key: value for key, value in own.items() if key in fields}
    return dataclasses.replace(optimizer, **given)  # type: ignore[type-var]


def _own_settings(kind: type) -> list[str]:
    names = (field.name for field in settings(kind))
    return [f"{name}=..." for name in names if name not in _OWN_KEYS]


MERGER_FORMS: Final = tuple(form(name, kind) for name, kind in MERGERS.items())
"""How each is written in a job file, settings included."""
SERVER_FORMS: Final = tuple(
    f"{name}[:{','.join(own)}]" if (own := _own_settings(kind)) else name
    for name, kind in SERVER_OPTIMIZERS.items()
)
