# SPDX-License-Identifier: Apache-2.0
"""Any method of the peft library that only changes linear layers, by its configuration.

Saved and read in peft's own layout, so that a result opens in the ecosystem.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import TYPE_CHECKING, Any, ClassVar

from protocol.factors import FactorPair
from tuning.errors import MethodError
from tuning.methods.method import Tuned

if TYPE_CHECKING:
    import torch
    from torch import nn

    from tuning.backbones import Backbone

ADAPTER = "default"
# Those that keep the forward pass a function of the layer's input, can be merged into it, and
# compile (VERA and RANDLORA move shared tensors about as they run). OFT and FOURIERFT fill matrices
# in place, which one client at a time can do, but not a cohort.
PEFT_TYPES = ("LORA", "LOHA", "LOKR", "IA3", "OFT", "FOURIERFT")


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftMethod:
    """A peft configuration by name, e.g. type "LOHA" with settings {r = 4, alpha = 8}.

    `settings` are handed to the configuration class as they are; `targets` names the layers, by
    default the query and value projections of a known architecture.
    """

    name: ClassVar[str] = "peft"
    mean_is_exact: ClassVar[bool] = False

    type: str
    targets: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.type.upper() not in PEFT_TYPES:
            raise MethodError(
                f'method.type is "{self.type}"; those that compile are {", ".join(PEFT_TYPES)}'
            )

    def attach(self, backbone: Backbone, *, seed: int) -> Tuned:
        """Inject the configuration's layers, drawn from `seed`."""
        return attach_peft(
            backbone, self.type.upper(), targets=self.targets, settings=self.settings, seed=seed
        )


def default_targets(backbone: Backbone) -> tuple[str, ...]:
    """Query and value projections, as the LoRA paper (arXiv 2106.09685, section 7.1) adapts.

    Raises:
        MethodError: the architecture is not listed, so that the job must name the layers.
    """
    if backbone.family is None:
        raise MethodError(
            f"{type(backbone.model).__name__} is not an architecture whose query and value layers "
            "are known; set method.targets to the names of its linear layers"
        )
    return (backbone.family.query, backbone.family.value)


def attach_peft(
    backbone: Backbone,
    peft_type: str,
    *,
    targets: tuple[str, ...],
    settings: Mapping[str, Any],
    seed: int,
) -> Tuned:
    """Attach a peft configuration and train it together with the classification layer."""
    import torch
    from peft import get_peft_config, get_peft_model

    names = list(targets or default_targets(backbone))
    try:
        config = get_peft_config(
            {
                "peft_type": peft_type,
                "target_modules": names,
                "modules_to_save": [backbone.classifier],
                **settings,
            }
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # peft 0.21 asks transformers 5 for a property that it renamed.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            torch.manual_seed(seed)
            wrapped = get_peft_model(backbone.model, config, adapter_name=ADAPTER)
    except (TypeError, ValueError, KeyError) as fault:
        raise MethodError(
            f"peft refuses {peft_type} on {type(backbone.model).__name__} with target modules "
            f"{names} and settings {dict(settings)}: {fault}"
        ) from fault
    config.base_model_name_or_path = backbone.name
    module = wrapped.base_model.model.eval()
    if peft_type == "LOHA":
        _write_out_loha(module)
    trainable = {
        public_name(name): name
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    return Tuned(
        module=module,
        trainable=trainable,
        fold=merge_layers,
        peft_config=config,
        pairs=_factor_pairs(module) if peft_type == "LORA" else (),
    )


def _factor_pairs(module: nn.Module) -> tuple[FactorPair, ...]:
    """The factors of every LoRA layer, sorted by name."""
    from peft.tuners.lora import LoraLayer

    return tuple(
        FactorPair(
            down=public_name(f"{path}.lora_A.{ADAPTER}.weight"),
            up=public_name(f"{path}.lora_B.{ADAPTER}.weight"),
            scale=float(layer.scaling[ADAPTER]),
            base=_base_weight(path, layer),
        )
        for path, layer in sorted(module.named_modules(), key=lambda item: item[0])
        if isinstance(layer, LoraLayer)
    )


def _base_weight(path: str, layer: Any) -> str:
    """The frozen weight's name where it is W0 [out, in]; a transposed one is not offered."""
    from torch import nn

    return f"{path}.base_layer.weight" if isinstance(layer.get_base_layer(), nn.Linear) else ""


def _write_out_loha(module: nn.Module) -> None:
    """Put plain products where LoHa has an autograd function, which no tracer can enter."""
    from peft.tuners.loha.layer import LoHaLayer

    for layer in module.modules():
        if isinstance(layer, LoHaLayer):
            layer.get_delta_weight = MethodType(_loha_weight, layer)


def _loha_weight(
    layer: Any, adapter_name: str, *, apply_rank_dropout: bool = False
) -> torch.Tensor:
    """(A1 B1) * (A2 B2) * scale; dropout is for training mode, in which no module here is."""
    first = layer.hada_w1_a[adapter_name] @ layer.hada_w1_b[adapter_name]
    second = layer.hada_w2_a[adapter_name] @ layer.hada_w2_b[adapter_name]
    product = first * second * layer.scaling[adapter_name]
    return product.reshape(layer.get_base_layer().weight.shape)


def public_name(name: str) -> str:
    """The name that peft saves a tensor under, without its constant prefix."""
    return name.replace(f".modules_to_save.{ADAPTER}", "").replace(f".{ADAPTER}", "")


def merge_layers(module: nn.Module) -> nn.Module:
    """Merge every adapted layer into the one that it wraps, and put that one back."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    for path, layer in list(module.named_modules()):
        parent, _, leaf = path.rpartition(".")
        if isinstance(layer, BaseTunerLayer):
            layer.merge(safe_merge=True)  # type: ignore[operator]
            setattr(module.get_submodule(parent), leaf, layer.get_base_layer())
        elif isinstance(layer, ModulesToSaveWrapper):
            setattr(module.get_submodule(parent), leaf, layer.modules_to_save[ADAPTER])
    return module
