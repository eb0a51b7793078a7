# SPDX-License-Identifier: Apache-2.0
"""FedIns: a pool of scale-and-shift elements, of which every image has its own few.

Source: Feng et al. 2023, ICCV, arXiv 2308.06051. A frozen query network, the backbone as it was,
turns an image into features q; the `selected` elements whose keys have the largest cosine with q
are averaged, scale and shift at every site of SSF, and so are their classifiers. The loss is
(1 - key_weight) * CE + key_weight * (1 - sum of the selected cosines), so that only what was
selected has a gradient. The server averages the pool index by index.

Differs from source: the selection is per image at any batch size (the released code averages it
over the batch as well); gamma is stored as 1 + `scale`, as in `ssf.py`; of equal cosines the
element with the smaller index is taken. With `one_bit` every element's scale and shift are used
as 1-bit values of their own mean and deviation, gradients straight through (Jie, Wang and Deng
2023, arXiv 2307.16867, for adapters); what is trained and travels are the latent values behind.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import nn

from tuning.errors import MethodError
from tuning.methods.method import Tuned
from tuning.methods.ssf import ScaleShift, fold_scales, sites
from tuning.quantizer import one_bit

if TYPE_CHECKING:
    from tuning.backbones import Backbone

KEY_STD = 0.02


class Answer(NamedTuple):
    """What the network says of a batch."""

    logits: torch.Tensor  # [B, classes]
    similarity: torch.Tensor  # [B], sum of the selected cosines, from -selected to selected
    selected: torch.Tensor  # [B, elements], 1 where an element was selected, else 0
    query: torch.Tensor  # [B, features], by which they were selected


class Mixture:
    """Scale and shift of every sample: there during a forward pass, read at every site."""

    parts: Sequence[torch.Tensor]  # [B, channels] each: scale and shift, site after site

    @contextmanager
    def of(self, parts: Sequence[torch.Tensor]) -> Iterator[None]:
        """Every site takes its own of these parts inside."""
        self.parts = parts
        try:
            yield
        finally:
            # A tensor of a trace must not outlive it.
            del self.parts


class PooledScaleShift(nn.Module):
    """A layer followed by y = (1 + scale) * h + shift, of each sample's own mixture.

    It is site number `place` of the network.
    """

    def __init__(
        self, base_layer: nn.Module, place: int, channels: int, channel_axis: int, mixture: Mixture
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.place = place
        self.channels = channels
        self.channel_axis = channel_axis
        self.mixture = mixture

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the layer, then each sample's affine map."""
        layer = self.base_layer
        bias = layer.bias if isinstance(layer, nn.Linear) else None
        output = layer(hidden) if bias is None else nn.functional.linear(hidden, layer.weight)
        shape = [output.shape[0], *[1] * (output.dim() - 1)]
        shape[self.channel_axis] = self.channels
        scale, shift = (part.reshape(shape) for part in self.own(self.mixture.parts))
        scale = 1.0 + scale
        if bias is not None:
            # Once a sample, not once a token: a pass over the output less.
            shift = shift + scale * bias
        return output * scale + shift

    def own(self, parts: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Scale and shift of this site."""
        return parts[2 * self.place : 2 * self.place + 2]

    @property
    def weight(self) -> torch.Tensor:
        """The layer's own weight: some networks ask their first layer for its data type."""
        return self.base_layer.weight

    def fixed(self, parts: Sequence[torch.Tensor]) -> ScaleShift:
        """The layer with one element alone, whose parts [channels] these are."""
        layer = ScaleShift(self.base_layer, self.channels, self.channel_axis)
        with torch.no_grad():
            scale, shift = self.own(parts)
            layer.scale.copy_(scale)
            layer.shift.copy_(shift)
        return layer


class InstancePool(nn.Module):
    """A backbone whose sites have pools, and the backbone as it was, which chooses of them.

    `model` and `query` share every frozen weight and end in features [B, features], where the
    backbone has its classifier, at `path`. An element is a row of `pool`: scale and shift of every
    site, one after the other.
    """

    def __init__(
        self,
        model: nn.Module,
        query: nn.Module,
        mixture: Mixture,
        *,
        classifier: nn.Linear,
        path: str,
        elements: int,
        selected: int,
        quantised: bool,
    ) -> None:
        super().__init__()
        self.model = model
        self.query = query
        self.mixture = mixture
        self.path = path
        self.selected = selected
        self.quantised = quantised
        features, classes = classifier.in_features, classifier.out_features
        self.widths = [site.channels for site in self.sites() for _ in ("scale", "shift")]
        self.pool = nn.Parameter(torch.empty(elements, sum(self.widths)))
        self.keys = nn.Parameter(torch.empty(elements, features))
        self.weight = nn.Parameter(torch.empty(elements, classes, features))
        self.bias = nn.Parameter(torch.zeros(elements, classes))

    def sites(self) -> list[PooledScaleShift]:
        """Every layer with a scale and a shift, in the order of their places in a row."""
        return [site for site in self.model.modules() if isinstance(site, PooledScaleShift)]

    def parts(self, rows: torch.Tensor) -> Sequence[torch.Tensor]:
        """Rows [..., pool width] cut into scale and shift of every site, [..., channels] each."""
        # One split, whose gradient is one concatenation; slices would each have a padded sum.
        return rows.split(self.widths, dim=-1)

    def used(self) -> torch.Tensor:
        """The pool as a forward pass uses it, [elements, pool width]."""
        if not self.quantised:
            return self.pool
        quantised = [one_bit(part, rows=True) for part in self.parts(self.pool)]
        return torch.cat(quantised, dim=-1)

    def forward(self, query: torch.Tensor | None = None, **batch: torch.Tensor) -> Answer:
        """Choose by the query features, then answer with the mixture of what was chosen.

        `query` [B, features] are the query features of the batch, where they are known already.
        """
        if query is None:
            query = self.query(**batch).logits
        cosines = nn.functional.normalize(query, dim=-1) @ nn.functional.normalize(
            self.keys, dim=-1
        ).transpose(-1, -2)
        chosen = leading(cosines, self.selected)
        weights = chosen / self.selected
        with self.mixture.of(self.parts(weights @ self.used())):
            features = self.model(**batch).logits
        # [B, M, C]: all classifiers, of which the mixture takes its own.
        scores = torch.einsum("bd,mcd->bmc", features, self.weight) + self.bias
        logits = (weights.unsqueeze(-1) * scores).sum(dim=-2)
        return Answer(logits, (chosen * cosines).sum(dim=-1), chosen, query)


def leading(values: torch.Tensor, count: int) -> torch.Tensor:
    """1 at the `count` largest of each row [..., M], else 0; of equal ones the first counts."""
    first = torch.arange(values.shape[-1], device=values.device)
    mine, other = values.unsqueeze(-1), values.unsqueeze(-2)
    before = (other > mine) | ((other == mine) & (first < first.unsqueeze(-1)))
    return (before.to(values.dtype).sum(dim=-1) < count).to(values.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class FedIns:
    """A pool of `elements`, of which each image takes `selected`; the source's 25, 3 and 0.1."""

    name: ClassVar[str] = "fedins"
    mean_is_exact: ClassVar[bool] = False

    elements: int = 25
    selected: int = 3
    key_weight: float = 0.1
    init_std: float = 0.02
    one_bit: bool = False

    def __post_init__(self) -> None:
        if self.elements < 1:
            raise MethodError(f"method.elements is {self.elements}; it must be at least 1")
        if not 1 <= self.selected <= self.elements:
            raise MethodError(
                f"method.selected is {self.selected}; it must be from 1 to method.elements = "
                f"{self.elements}"
            )
        if not 0 <= self.key_weight < 1:
            raise MethodError(f"method.key_weight is {self.key_weight}; it must be in [0, 1)")
        if not 0 <= self.init_std < 1:
            raise MethodError(f"method.init_std is {self.init_std}; it must be in [0, 1)")
        if self.one_bit and self.init_std == 0:
            raise MethodError(
                "method.init_std is 0; it must be above 0 with method.one_bit, whose values have "
                "the deviation of what they start from"
            )

    def attach(self, backbone: Backbone, *, seed: int) -> Tuned:
        """Give every site of SSF a pool, and put the backbone as it was beside it."""
        model = backbone.model
        classifier = model.get_submodule(backbone.classifier)
        if not isinstance(classifier, nn.Linear):
            raise MethodError(
                f"the classifier of {type(model).__name__} is a {type(classifier).__name__}; "
                "FedIns needs a single linear layer"
            )
        model.set_submodule(backbone.classifier, nn.Identity())
        # The same weights once more, not a copy of them.
        shared = {id(value): value for value in (*model.parameters(), *model.buffers())}
        query = copy.deepcopy(model, shared)
        generator = torch.Generator().manual_seed(seed)
        mixture = Mixture()
        for place, (path, module, (channels, axis)) in enumerate(sites(model)):
            site = PooledScaleShift(module, place, channels, axis, mixture)
            model.set_submodule(path, site)
        pool = InstancePool(
            model,
            query,
            mixture,
            classifier=classifier,
            path=backbone.classifier,
            elements=self.elements,
            selected=self.selected,
            quantised=self.one_bit,
        )
        nn.init.normal_(pool.pool, std=self.init_std, generator=generator)
        nn.init.trunc_normal_(pool.keys, std=KEY_STD, generator=generator)
        for element in pool.weight.detach():
            nn.init.kaiming_normal_(element, generator=generator)
        return Tuned(
            module=pool,
            trainable={
                "pool": "pool",
                "keys": "keys",
                f"{backbone.classifier}.weight": "weight",
                f"{backbone.classifier}.bias": "bias",
            },
            fold=(lambda module: fold_element(module, 0)) if self.elements == 1 else None,
            sample_loss=self._sample_loss,
            tallies={"selected": self.elements},
            # Of one element there is nothing to choose: it is folded, and no query is left.
            features="query" if self.elements > 1 else "",
            fold_element=fold_element,
        )

    def _sample_loss(self, entropies: torch.Tensor, answer: Answer) -> torch.Tensor:
        far = 1.0 - answer.similarity
        return (1.0 - self.key_weight) * entropies + self.key_weight * far


def fold_element(pool: nn.Module, index: int) -> nn.Module:
    """The backbone with one element merged into it, and that element's classifier: its very graph.

    Raises: MethodError for an index that the pool does not have.
    """
    assert isinstance(pool, InstancePool), "only what FedIns attached has elements"
    if not 0 <= index < len(pool.keys):
        raise MethodError(f"element is {index}; the pool has 0 to {len(pool.keys) - 1}")
    parts = pool.parts(pool.used()[index].detach())
    for path, layer in list(pool.model.named_modules()):
        if isinstance(layer, PooledScaleShift):
            pool.model.set_submodule(path, layer.fixed(parts))
    fold_scales(pool.model)
    classifier = nn.Linear(pool.weight.shape[-1], pool.weight.shape[-2])
    with torch.no_grad():
        classifier.weight.copy_(pool.weight[index])
        classifier.bias.copy_(pool.bias[index])
    pool.model.set_submodule(pool.path, classifier)
    return pool.model
