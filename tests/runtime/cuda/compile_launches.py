"""Compile what engines launch: each kernel as a launch on the fake GPU hands it to Triton, for a capability (argument).

Needs no GPU, and a process in which Triton is not the interpreter. One line of JSON for each variant: kernel, error.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import MockTensor

from drafter.config import TreeShape
from tests.engines import request
from tests.runtime.cuda import fake_gpu
from trtkit.bench.random_model import RandomWeights, random_head, shape_spec
from trtkit.runtime.model import DecoderModel
from trtkit.runtime.torch_engine import TorchEngine
from trtkit.runtime.torch_options import Drafting, TorchLimits

ENGINES: tuple[tuple[str, str, int, bool], ...] = (
    ("bf16", "model", 12, False), ("fp8", "model", 12, True), ("fp8", "fp8", 48, False), ("int4", "model", 1, False),
    ("int8", "int8", 12, False), ("int8-sq", "fp8", 12, False),
)  # fmt: skip
"""Precision, KV dtype, rows, with a draft head."""
KINDS: tuple[dict[str, Any], ...] = ({"temperature": 1.0}, {"top_p": 0.9, "top_k": 20}, {"temperature": 0.0})


class _Driver:
    """In the place of the one that asks the GPU."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


class _Recorded(fake_gpu._Kernel):
    """Keeps the arguments of the first launch of each variant."""

    seen: ClassVar[dict[object, tuple[Any, dict[str, Any]]]] = {}

    def __init__(self, gpu: fake_gpu.FakeGpu, kernel: Any) -> None:
        super().__init__(gpu, kernel)
        self._real = kernel

    def _launch(self, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
        super()._launch(grid, *args, **kwargs)
        with torch._C.DisableTorchFunction():
            variant = self._gpu.launches[-1].variant()
        arguments = dict(zip(self._real.arg_names, args, strict=False)) | kwargs
        # Their types and alignment are all that counts; what is not aligned, Triton is told not to look at.
        mocks = {name: MockTensor(x.dtype) if isinstance(x, Tensor) else x for name, x in arguments.items()}
        self.seen.setdefault(variant, (self._real, mocks))


def play(precision: Any, kv_dtype: Any, rows: int, drafts: bool) -> None:
    """An engine of one layer in the shape of a 14B: plain and drafted steps, with all kinds of cuts."""
    spec = dataclasses.replace(shape_spec("14b"), layers=1)
    weights = RandomWeights(spec=spec, precision=precision, device=fake_gpu.CUDA)
    model = DecoderModel(weights, device=fake_gpu.CUDA, dtype=torch.bfloat16, max_tokens=4096)
    drafting = None
    if drafts:
        head = random_head(spec, device=fake_gpu.CUDA, dtype=torch.bfloat16, vocabulary=32768)
        drafting = Drafting(head=head, trees=(TreeShape(beams=1, length=3),))
    limits = TorchLimits(rows=rows, total_tokens=3000, kv_blocks=900, kv_dtype=kv_dtype)
    engine = TorchEngine(model, limits, drafting)
    for kind in KINDS:
        for index in range(rows):
            engine.submit(request(str(index), (index, 1, 2), max_tokens=5, **kind))
        while engine.has_work:
            engine.step()


def errors(capability: int) -> Iterator[tuple[str, str]]:
    """(kernel, what Triton says against it, or nothing) of each variant that the engines launch."""
    driver.set_active(_Driver(capability))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake_gpu, "_Kernel", _Recorded)
        for engine in ENGINES:
            with (
                pytest.MonkeyPatch.context() as inner,
                fake_gpu.fake_gpu(inner, capability=divmod(capability, 10)),
            ):
                play(*engine)
    for kernel, arguments in _Recorded.seen.values():
        try:
            kernel.warmup(grid=(1,), **arguments)
        except Exception as problem:
            yield kernel.fn.__name__, f"{type(problem).__name__}: {problem}"
        else:
            yield kernel.fn.__name__, ""


if __name__ == "__main__":
    for name, error in errors(int(sys.argv[1])):
        sys.stdout.write(json.dumps([name, error]) + "\n")
        sys.stdout.flush()  # what a crash comes after
