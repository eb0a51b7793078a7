# SPDX-License-Identifier: Apache-2.0
"""The 1-bit quantiser of the 1-bit adapters, with a straight-through gradient.

Source: Jie, Wang and Deng 2023, arXiv 2307.16867, section 3.2: a weight matrix is standardised,
every value becomes the nearer of two codes, and the result is scaled back.
"""

from __future__ import annotations

import torch

# The 2-medians of a standard normal distribution: its quartiles.
CODE = 0.6744897501960817
EPSILON = 1e-5


def one_bit(weight: torch.Tensor, *, rows: bool = False) -> torch.Tensor:
    """Quantise one matrix: code * std + mean, where code is +-0.6745 and zero counts as plus.

    With `rows` every row of the first axis is a matrix of its own. Mean and (unbiased) standard
    deviation are part of the gradient, the rounding is not: its derivative is taken as one.
    """
    over = tuple(range(int(rows), weight.dim()))
    mean = weight.mean(dim=over, keepdim=True)
    deviation = weight.std(dim=over, keepdim=True)
    standard = (weight - mean) / (deviation + EPSILON)
    code = torch.where(standard >= 0, CODE, -CODE)
    return (standard + (code - standard).detach()) * deviation + mean
