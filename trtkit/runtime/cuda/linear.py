"""Linears on a CUDA device: y = W (pre_scale * x) + bias by the kernel measured to be fastest for the row count.

Up to 256 rows the product comes from the kernels of :mod:`products` or from cuBLAS, whichever was faster on the
device; above, from cuBLAS: e4m3 and int8 codes as they are, weight-only formats behind an expansion to bfloat16.
``linear_reference`` in ``quant/tensor.py`` is the definition.

Letters: M rows of x, N output features, K input features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from trtkit.log import logger
from trtkit.quant.tensor import LinearWeights
from trtkit.runtime.cuda.choices import BUCKETS, Choice, bucket_of, candidates, default_choice
from trtkit.runtime.cuda.kernels import triton_runs

__all__ = ["CudaLinear", "cuda_linear", "prepare_linears"]

_ALIGNMENT = 16
"""N and K are multiples of this, for 16-byte loads and for cuBLAS."""
_GROUP = 128


class CudaLinear:
    """One linear; calling it multiplies x bfloat16 (M, K) to (M, N), without waiting for the device.

    A row of the result depends on no other row. Row counts of different buckets may take different kernels, which round
    the same sums in different order.
    """

    def __init__(self, weights: LinearWeights, device: torch.device) -> None:
        # Triton is loaded by the first linear on a CUDA device.
        from trtkit.runtime.cuda import launch, tuning

        self._launch, self._tuning = launch, tuning
        self.weights = launch.place(weights, device)
        self._gpu = tuning.gpu_of(device)
        self._choices: dict[int | None, Choice] = {}

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] == 0:
            return x.new_empty((0, self.weights.shape.columns))
        return self.run(x, self.choice(x.shape[0]))

    def run(self, x: Tensor, choice: Choice) -> Tensor:
        """The product by a given kernel."""
        return self._launch.run(x.contiguous(), self.weights, choice)

    def choice(self, rows: int) -> Choice:
        """The kernel for ``rows`` rows: the measured one once it is prepared, else the default."""
        bucket = bucket_of(rows)
        found = self._choices.get(bucket)
        if found is None:
            found = self._choices[bucket] = default_choice(self.weights.shape, bucket, self._gpu)
        return found

    def prepare(self, max_rows: int) -> None:
        """Measure, compile and reserve memory for up to ``max_rows`` rows; before CUDA graphs are captured.

        What an earlier call, another linear of the same shape or an earlier run has measured is not measured again.
        """
        for bucket in BUCKETS[: 1 + next((i for i, rows in enumerate(BUCKETS) if rows >= max_rows), len(BUCKETS))]:
            self.tune(bucket)
        if max_rows > BUCKETS[-1]:
            self(self._sample(BUCKETS[-1] + 1))

    def tune(self, bucket: int) -> Choice:
        """The fastest kernel for ``bucket`` rows, which is used from now on; where there is no memory left to measure
        in, the default."""
        shape, device = self.weights.shape, self.weights.device
        table, x = self._tuning.table_of(device), self._sample(bucket)
        found = table.get(shape, bucket)
        if found is None:
            options = candidates(shape, bucket, self._gpu)
            try:
                found, spent = self._tuning.fastest(options, lambda option: self.run(x, option), device)
            except torch.OutOfMemoryError:
                logger.debug("%s, %d rows: no memory to measure in", shape, bucket)
                found = default_choice(shape, bucket, self._gpu)
            else:
                table.put(shape, bucket, found, spent)
                logger.debug("%s, %d rows: %s, %.1f us", shape, bucket, found, spent)
        self._choices[bucket] = found
        self.run(x, found)
        return found

    def _sample(self, rows: int) -> Tensor:
        return torch.zeros((rows, self.weights.shape.depth), dtype=torch.bfloat16, device=self.weights.device)


def cuda_linear(weights: LinearWeights, *, device: torch.device, dtype: torch.dtype) -> CudaLinear | None:
    """The kernels for one linear; None where they do not fit it: odd shapes, float32, an old GPU, no working Triton."""
    if device.type != "cuda" or dtype != torch.bfloat16 or not fits(weights):
        return None
    needed = (8, 9) if weights.weight.format == "fp8" else (8, 0)
    if torch.cuda.get_device_capability(device) < needed or not triton_runs(device):
        return None
    return CudaLinear(weights, device)


def fits(weights: LinearWeights) -> bool:
    """Whether the kernels take a matrix of this shape."""
    weight = weights.weight
    columns, depth = weight.shape
    if columns % _ALIGNMENT or depth % _ALIGNMENT:
        return False
    if weight.format == "int4":
        return weight.scale is not None and weight.scale.shape[1] * _GROUP == depth
    # A scale per row has no cuBLAS product in e4m3.
    return weight.format != "fp8" or (weight.scale is not None and weight.scale.numel() == 1)


def prepare_linears(kernels: Iterable[Callable[[Tensor], Tensor]], max_rows: int) -> None:
    """Prepare those among ``kernels`` that are :class:`CudaLinear`."""
    for kernel in kernels:
        if isinstance(kernel, CudaLinear):
            kernel.prepare(max_rows)
