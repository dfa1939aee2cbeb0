"""Memory that the products of one device share: parts of split sums, arrival counters, expanded weights.

Kernels on one stream follow each other, so one workspace serves all linears; it must not be used from two streams at
once. Growing leaves the old memory alive, because a captured CUDA graph may still write to it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["Workspace", "workspace_of"]


class Workspace:
    """Grows to the largest product seen; reserve before a graph is captured."""

    def __init__(self, device: torch.device) -> None:
        self.partial = torch.empty(0, dtype=torch.float32, device=device)
        """float32, parts of the sums of split products."""
        self.arrived = torch.zeros(0, dtype=torch.int32, device=device)
        """int32, one counter per tile; every product leaves them at zero."""
        self.expanded = torch.empty(0, dtype=torch.bfloat16, device=device)
        """bfloat16, one whole weight matrix, for products with many rows."""
        self._retired: list[Tensor] = []

    def reserve(self, *, partial: int = 0, tiles: int = 0, expanded: int = 0) -> None:
        """Make room for so many values of each kind."""
        if partial > self.partial.numel():
            self._retired.append(self.partial)
            self.partial = self.partial.new_empty(partial)
        if tiles > self.arrived.numel():
            self._retired.append(self.arrived)
            self.arrived = self.arrived.new_zeros(tiles)
        if expanded > self.expanded.numel():
            self._retired.append(self.expanded)
            self.expanded = self.expanded.new_empty(expanded)


@functools.cache
def workspace_of(device: torch.device) -> Workspace:
    """The workspace of a device, made on first use."""
    return Workspace(device)
