# SPDX-License-Identifier: Apache-2.0
"""The patch embedding of a vision transformer as a matrix product."""

from __future__ import annotations

import torch
from torch import nn


class PatchProjection(nn.Module):
    """A convolution whose stride equals its kernel, computed as one matrix product.

    Same parameters (`weight` [D, C, p, p], `bias` [D]) and the same values as the `nn.Conv2d` that
    it replaces. Its backward is a matrix product as well, which has a plain ONNX form; the
    backward of a convolution has none.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.weight = convolution.weight
        self.bias = convolution.bias
        self.patch = int(convolution.kernel_size[0])
        self.out_channels = int(convolution.out_channels)

    @staticmethod
    def fits(module: nn.Conv2d) -> bool:
        """Whether the convolution reads disjoint square patches."""
        kernel = tuple(module.kernel_size)
        return (
            kernel == tuple(module.stride)
            and kernel[0] == kernel[1]
            and tuple(module.dilation) == (1, 1)
            and module.groups == 1
            and module.padding in ((0, 0), "valid")
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, D, H/p, W/p]."""
        batch, channels, height, width = images.shape
        patch = self.patch
        rows, columns = height // patch, width // patch
        patches = images.reshape(batch, channels, rows, patch, columns, patch)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)
        weight = self.weight.reshape(self.out_channels, -1)
        projected = nn.functional.linear(patches, weight, self.bias)
        return projected.transpose(1, 2).reshape(batch, self.out_channels, rows, columns)
