# SPDX-License-Identifier: Apache-2.0
"""What a method is: it attaches its tensors to a backbone and says what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from protocol.factors import FactorPair
from tuning.errors import MethodError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from tuning.backbones import Backbone
    from tuning.cuts import Parts

Batch = Mapping[str, "torch.Tensor"]


def unchanged(batch: Batch) -> Batch:
    """The batch as the backbone's preprocessing made it."""
    return batch


def cross_entropy_alone(entropies: torch.Tensor, answer: Any) -> torch.Tensor:
    """The loss of most methods."""
    return entropies


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """A backbone with a method's tensors attached.

    Attributes:
        module: answers one batch, given by keyword, with `.logits` [batch, classes].
        trainable: what is trained and travels: public name -> parameter name in `module`.
        fold: takes a copy of `module` with trained tensors in it and returns the module to use
            for inference, with the tensors merged into the backbone; None where a method cannot
            be merged and `module` itself is used.
        prepare: what must happen to a batch before `module` sees it.
        peft_config: the peft configuration that the tensors belong to, where peft has the method.
        sample_loss: the loss of each sample [B], of its cross-entropy [B] and the module's answer.
        tallies: what a training step counts, by name, with how many values: an attribute of the
            module's answer, [B, values].
        pairs: layers whose weight is changed by scale * up @ down, of two trainable matrices.
        features: what of a batch may be known beforehand, as it depends on frozen weights alone: an
            attribute of the module's answer, [B, values], and the keyword by which the module
            takes it instead of computing it; "" where a method has nothing of the kind.
        fold_element: as `fold`, for one of the elements that a method chooses from, by its number.
        parts: the module cut into head, body and tail, where a method trains it so; its
            parameters keep their names in them.
    """

    module: nn.Module
    trainable: Mapping[str, str]
    fold: Callable[[nn.Module], nn.Module] | None = None
    prepare: Callable[[Batch], Batch] = field(default=unchanged)
    peft_config: Any = None
    sample_loss: Callable[[torch.Tensor, Any], torch.Tensor] = field(default=cross_entropy_alone)
    tallies: Mapping[str, int] = field(default_factory=dict)
    pairs: tuple[FactorPair, ...] = ()
    features: str = ""
    fold_element: Callable[[nn.Module, int], nn.Module] | None = None
    parts: Parts | None = None

    def parameters(self) -> dict[str, torch.Tensor]:
        """The trainable tensors by public name, sorted, detached from any graph."""
        found = dict(self.module.named_parameters())
        return {name: found[self.trainable[name]].detach() for name in sorted(self.trainable)}

    def frozen(self) -> dict[str, torch.Tensor]:
        """Every other parameter and saved buffer of the module, by its name there.

        One that several modules share is there once, under its first name.
        """
        trained = set(self.trainable.values())
        found: dict[int, str] = {}
        tensors = self.module.state_dict(keep_vars=True)
        for name, tensor in tensors.items():
            found.setdefault(id(tensor), name)
        return {name: tensors[name].detach() for name in found.values() if name not in trained}


class Method(Protocol):
    """A parameter-efficient fine-tuning method and its settings.

    `mean_is_exact` says whether the mean of the clients' tensors gives the network with the mean
    of the clients' changes, as it does for anything linear in its tensors.
    """

    name: ClassVar[str]
    mean_is_exact: ClassVar[bool]

    def attach(self, backbone: Backbone, *, seed: int) -> Tuned:
        """Attach freshly drawn tensors. The backbone's own model is changed and then owned."""
        ...


def query_and_value(backbone: Backbone, what: str) -> list[tuple[str, nn.Module]]:
    """The query and value projection of every block, with their paths in the model.

    Raises: MethodError where the architecture is not known; `what` says who needs it.
    """
    family = backbone.family
    if family is None:
        raise MethodError(
            f"{type(backbone.model).__name__} is not an architecture whose blocks are known; "
            f"{what} fits ViT, BERT and LLaMA backbones"
        )
    blocks = backbone.model.get_submodule(family.blocks)
    return [
        (f"{family.blocks}.{index}.{path}", block.get_submodule(path))
        for index, block in enumerate(blocks.children())
        for path in (family.query, family.value)
    ]


def classifier_parameters(backbone: Backbone) -> dict[str, str]:
    """Public name -> parameter name of the classification layer, which every method trains."""
    prefix = backbone.classifier + "."
    return {name: name for name, _ in backbone.model.named_parameters() if name.startswith(prefix)}
