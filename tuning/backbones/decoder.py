# SPDX-License-Identifier: Apache-2.0
"""A decoder as a classifier of whole texts: what it has read after the last token decides."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn


class Scores(NamedTuple):
    """What the classifier says of a batch."""

    logits: torch.Tensor  # [B, classes]


class PlainSiLU(nn.Module):
    """x * sigmoid(x), whose gradient has a plain ONNX form; that of torch's own SiLU has none."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Any shape, element by element."""
        return hidden * torch.sigmoid(hidden)


class DecoderClassifier(nn.Module):
    """The parts of a `transformers` decoder for sequence classification, under the same names.

    Takes what every text backbone takes here, an additive mask [B, 1, 1, T] with 0 where there is
    a token; the model's own forward would take such a mask for a whole one, and let each token see
    those behind it. Padding is known by the mask: the padding token may be a word as well.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.config = model.config
        self.prefix = str(model.base_model_prefix)
        setattr(self, self.prefix, getattr(model, self.prefix))
        self.score = model.score
        for module in list(self.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.SiLU) or type(child).__name__ == "SiLUActivation":
                    setattr(module, name, PlainSiLU())

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Scores:
        """Token numbers [B, T], or what stands for their embeddings [B, T, D] -> [B, classes]."""
        decoder = getattr(self, self.prefix)
        embedded = decoder.get_input_embeddings()(input_ids)
        length = embedded.shape[1]
        lowest = torch.finfo(embedded.dtype).min
        place = torch.arange(length, device=embedded.device)
        later = (place > place.unsqueeze(-1)).to(embedded.dtype)
        # The sum of two lowest values would be infinite, and a padding row of such no number.
        mask = torch.clamp(later * lowest + attention_mask, min=lowest)
        hidden = decoder(inputs_embeds=embedded, attention_mask=mask, use_cache=False)
        is_token = (attention_mask[:, 0, 0] == 0).to(embedded.dtype)
        last = (is_token * place).amax(dim=-1, keepdim=True)
        chosen = (place == last).to(embedded.dtype)
        read = (hidden.last_hidden_state * chosen.unsqueeze(-1)).sum(dim=1)
        return Scores(self.score(read))
