"""A GPU that is not there: the host's side of the CUDA path with fake tensors on ``cuda:0``, on any machine.

Tensors have shapes, strides, types and a device, but no numbers. Kernel launches and the calls of ``torch.cuda`` are
recorded and checked instead of made. What a real device would refuse, or would do something else with, is an
``AssertionError`` or torch's own error about devices:

- tensors of two devices in one operation, or in the arguments of a kernel;
- dtypes, layouts and grids that a kernel does not take (``kernel_rules``);
- while a graph is captured: whatever waits for the device, looks at numbers, lies on the host, or makes a kernel of a
  kind that the warm-up has not compiled;
- an asynchronous copy from or to memory of the host that is not pinned.

Numbers that the host asks for are ``answer``. Not seen: streams, races, what runs out of memory, and wrong results.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.runtime.cuda.kernel_rules import RULES, Launch, check_launch
from trtkit.runtime.cuda.choices import Choice, Gpu, Shape, candidates
from trtkit.runtime.native.loader import SWITCH

CUDA = torch.device("cuda")
_HERE = torch.device("cuda", 0)
_WAITS = {"_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select"}


@dataclass(eq=False)
class FakeGpu:
    """What has happened on it."""

    answer: int = 1
    capability: tuple[int, int] = (9, 0)
    launches: list[Launch] = field(default_factory=list)
    capturing: bool = False
    graphs: list[FakeGraph] = field(default_factory=list)
    waits: int = 0
    """Times that the host waited for the device, or looked at its numbers."""
    pinned: set[int] = field(default_factory=set)
    variants: set[tuple[object, ...]] = field(default_factory=set)
    """Kernels compiled so far: name, constants and what a launch is specialised on."""

    measures: bool = False
    """Whether linears are tuned. Else each takes one of its candidates, by turns."""
    choices: int = 0

    def chosen(self, shape: Shape, bucket: int) -> Choice | None:
        """What the tuner's table says."""
        if self.measures:
            return None
        self.choices += 1
        options = candidates(shape, bucket, Gpu(sms=132, capability=self.capability, shared_bytes=227 << 10))
        return options[5 * self.choices % len(options)]

    def launched(self) -> set[str]:
        """Names of the kernels that ran."""
        return {launch.name for launch in self.launches}

    def wait(self) -> None:
        """The host waits for the device."""
        assert not self.capturing, "the host waits for the device while a graph is captured"
        self.waits += 1


@dataclass(eq=False)
class FakeGraph:
    """``torch.cuda.CUDAGraph``."""

    gpu: FakeGpu
    replays: int = 0
    captured: int = 0

    def replay(self) -> None:
        assert self.captured == 1, "replayed before it was captured"
        self.replays += 1

    def reset(self) -> None:
        self.captured = 0


class _Fake(FakeTensorMode):
    avoid_device_init = True
    """Whatever ``torch.cuda.is_available`` says."""


class _Watch(TorchDispatchMode):
    """Sees every operation on its way to torch."""

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        gpu, kwargs = self._gpu, kwargs or {}
        name = func.__name__.split(".")[0]
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(tensor.device.type == "cuda" for tensor in tensors)
        if name in _WAITS and any(isinstance(tensor, FakeTensor) for tensor in tensors):
            if on_device:
                gpu.wait()
            return self._look(name, args)
        if gpu.capturing and name != "device":
            for tensor in tensors:
                assert tensor.device.type == "cuda", f"{name} of a tensor of the host while a graph is captured"
        if name in ("copy_", "_to_copy", "to"):
            self._copied(args, kwargs)
        result = func(*args, **kwargs)
        if gpu.capturing:
            for made in pytree.tree_leaves(result):
                here = not isinstance(made, Tensor) or made.device.type == "cuda"
                assert here, f"{name} makes a tensor on the host while a graph is captured"
        return result

    def _look(self, name: str, args: Any) -> Any:
        subject = args[0]
        if name == "nonzero":
            return subject.new_zeros((subject.numel(), subject.ndim), dtype=torch.int64)
        assert name != "masked_select", "not needed so far"
        if subject.dtype == torch.bool or name in ("equal", "is_nonzero"):
            return bool(self._gpu.answer)
        return float(self._gpu.answer) if subject.is_floating_point() else self._gpu.answer

    def _copied(self, args: Any, kwargs: Any) -> None:
        """Waits, and needs pinned memory where it does not."""
        target = args[0]
        source = args[1] if len(args) > 1 and isinstance(args[1], Tensor) else args[0]
        places = {target.device.type, source.device.type}
        if target is source and kwargs.get("device") is not None:
            places.add(torch.device(kwargs["device"]).type)
        if places != {"cpu", "cuda"}:
            return
        if not (kwargs.get("non_blocking") or (len(args) > 2 and args[2] is True)):
            self._gpu.wait()
            return
        host = target if target.device.type == "cpu" else source
        assert host.untyped_storage()._cdata in self._gpu.pinned, "an asynchronous copy of memory that is not pinned"


class _Python(TorchFunctionMode):
    """What the Python bindings do on their own, without a CUDA build: indexing, numpy, devices without a number."""

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        mine = _MINE.get(func)
        if mine is not None and isinstance(args[0], FakeTensor):
            return mine(*args, **kwargs)
        if "device" in kwargs:
            kwargs["device"] = _numbered(kwargs["device"])
        elif func is Tensor.to:
            args = tuple(_numbered(arg) for arg in args)
        result = func(*args, **kwargs)
        if kwargs.get("pin_memory"):
            assert not self._gpu.capturing
            self._gpu.pinned.add(result.untyped_storage()._cdata)
        return result


def _numbered(device: Any) -> Any:
    return _HERE if isinstance(device, torch.device | str) and str(device) == "cuda" else device


def _get_item(x: Tensor, index: Any) -> Tensor:
    part, picks = _indexed(x, index)
    return torch.ops.aten.index(part, picks) if picks else part


def _set_item(x: Tensor, index: Any, value: Any) -> Tensor:
    part, picks = _indexed(x, index)
    values = value if isinstance(value, Tensor) else part.new_full((), value)
    return torch.ops.aten.index_put_(part, picks, values) if picks else torch.ops.aten.copy_(part, values)


def _contiguous(x: Tensor) -> Tensor:
    return x if x.is_contiguous() else torch.clone(x, memory_format=torch.contiguous_format)


def _attention(q: Tensor, k: Tensor, v: Tensor, *, enable_gqa: bool, **mask: Any) -> Tensor:
    """What flash attention takes; everything else would hold all scores in float32."""
    bias = mask.get("attn_mask")
    corner = getattr(bias, "corner", None)
    for x in (q, k, v):
        assert x.device == q.device, "attention over two devices"
        assert (x.dtype, x.ndim, x.stride(-1)) == (q.dtype, 4, 1), "attention over what flash attention does not take"
    assert q.shape[1] % k.shape[1] == 0
    assert k.shape == v.shape
    if q.dtype != torch.float32:
        assert bias is None or corner is not None, "a mask of numbers and fewer KV heads: no flash attention"
    assert corner in (None, (q.shape[2], k.shape[2]))
    batch, heads, tokens, width = q.shape
    return q.new_empty(batch, tokens, heads, width).transpose(1, 2)


def _into(*parts: Tensor, out: Tensor | None = None) -> Tensor:
    """``torch.mm`` and ``torch.addmm``; without a CUDA build nothing is written to a fake ``out``."""
    made = torch.ops.aten.mm(*parts) if len(parts) == 2 else torch.ops.aten.addmm(*parts)
    if out is None:
        return made
    assert (out.shape, out.dtype, out.device) == (made.shape, made.dtype, made.device)
    return out


def _numpy(x: Tensor) -> Any:
    assert x.device.type == "cpu", "numpy of a tensor on the device"
    return np.zeros(x.shape, str(x.dtype).removeprefix("torch."))


_MINE: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: _get_item, Tensor.__setitem__: _set_item, Tensor.__invert__: torch.ops.aten.bitwise_not,
    Tensor.contiguous: _contiguous, Tensor.copy_: torch.ops.aten.copy_, Tensor.numpy: _numpy,
    Tensor.nonzero: torch.ops.aten.nonzero, **{
        getattr(Tensor, f"__{kind.__name__}__"): lambda x, kind=kind: kind(x.item()) for kind in (bool, int, float)
    }, F.scaled_dot_product_attention: _attention, torch.mm: _into, torch.addmm: _into,
}  # fmt: skip


def _indexed(x: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None]]:
    """``x[index]`` without a CUDA build: a view, and what of the index are tensors."""
    parts = list(index) if isinstance(index, tuple) else [index]
    known = sum(1 if not isinstance(part, Tensor) or part.dtype != torch.bool else part.ndim
                for part in parts if part is not None and part is not Ellipsis)  # fmt: skip
    if any(part is Ellipsis for part in parts):
        at = next(place for place, part in enumerate(parts) if part is Ellipsis)
        parts[at : at + 1] = [slice(None)] * (x.ndim - known)
    picks: list[Tensor | None] = []
    dim = 0
    for part in parts:
        if part is None:
            x = x.unsqueeze(dim)
        elif isinstance(part, Tensor):
            for each in torch.ops.aten.nonzero(part).unbind(1) if part.dtype == torch.bool else [part]:
                picks += [None] * (dim - len(picks)) + [each]
                dim += 1
            continue
        elif isinstance(part, int):
            x = x.select(dim, part)
            continue
        else:
            x = torch.ops.aten.slice(x, dim, part.start, part.stop, part.step or 1)
        dim += 1
    return x, picks


def _moved(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """``Module._apply`` without swapping tensors, which fake ones cannot be."""
    for child in module.children() if recurse else ():
        _moved(child, change)
    for name, parameter in module.named_parameters(recurse=False):
        module._parameters[name] = nn.Parameter(change(parameter.detach()), parameter.requires_grad)
    return module


def _bias(*corner: int) -> Tensor:
    """For ``causal_lower_right``, which is a class of tensors of its own."""
    made = torch.empty(())
    made.corner = corner
    return made


class _Kernel:
    """In the place of a Triton kernel."""

    def __init__(self, gpu: FakeGpu, kernel: Any) -> None:
        self._gpu, self._fn = gpu, kernel.fn
        self._signature = inspect.signature(self._fn)
        written = {**vars(kernel), **getattr(kernel, "kwargs", {})}  # compiled, or interpreted
        names = ("do_not_specialize", "do_not_specialize_on_alignment")
        self._loose = frozenset(part for name in names for part in written.get(name) or ())

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in list(kwargs) if name not in self._signature.parameters}
        bound = self._signature.bind(*args, **kwargs).arguments
        constant = {
            name for name, parameter in self._signature.parameters.items() if "constexpr" in str(parameter.annotation)
        }
        launch = Launch(
            name=self._fn.__name__, grid=grid, options=options,
            values={name: value for name, value in bound.items() if name not in constant},
            constants={name: value for name, value in bound.items() if name in constant}, loose=self._loose,
        )  # fmt: skip
        with torch._C.DisableTorchFunction():
            check_launch(launch)
            variant = launch.variant()
        if self._gpu.capturing:
            assert variant in self._gpu.variants, f"{launch.name} would be compiled while a graph is captured"
        self._gpu.variants.add(variant)
        self._gpu.launches.append(launch)


@contextlib.contextmanager
def fake_gpu(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Iterator[FakeGpu]:
    """Everything within runs on it. Models, caches and engines must be made within, too."""
    from trtkit.runtime.cuda import attention, dependent, kernels, launch, pointwise, sampling, tuning, workspace
    from trtkit.runtime.torch_engine import TorchEngine

    gpu, fake = FakeGpu(**settings), _Fake(allow_non_fake_inputs=True)
    for room in (attention, launch, pointwise, sampling):
        for name, kernel in list(vars(room).items()):
            if name in RULES:
                monkeypatch.setattr(room, name, _Kernel(gpu, kernel))
    _patch_torch(monkeypatch, gpu)
    monkeypatch.setattr("torch.nn.attention.bias.causal_lower_right", _bias)
    monkeypatch.setattr(nn.Module, "_apply", _moved)
    # In inference mode operations arrive whole (``to`` for ``_to_copy``), which fake tensors are not made for.
    monkeypatch.setattr(TorchEngine, "step", torch.no_grad()(inspect.unwrap(TorchEngine.step)))
    table = SimpleNamespace(get=gpu.chosen, put=lambda *_: None)
    monkeypatch.setattr(tuning, "table_of", lambda _device: table)
    monkeypatch.setattr(kernels, "_compiles", lambda _device: True)
    monkeypatch.delenv(SWITCH, raising=False)
    caches = (workspace.workspace_of, tuning.gpu_of, dependent.dependent, _asked())
    for cache in caches:
        cache.cache_clear()
    try:
        with fake, _Watch(gpu), _Python(gpu):
            yield gpu
    finally:
        for cache in caches:
            cache.cache_clear()


def _asked() -> Any:
    from trtkit.runtime import sampling

    return sampling._triton_runs


def _patch_torch(monkeypatch: pytest.MonkeyPatch, gpu: FakeGpu) -> None:
    """The calls of ``torch.cuda`` that the CUDA path makes."""

    @contextlib.contextmanager
    def capture(graph: FakeGraph, **_: Any) -> Iterator[None]:
        assert not gpu.capturing
        gpu.capturing = True
        try:
            yield
        finally:
            gpu.capturing = False
        graph.captured += 1

    def graph() -> FakeGraph:
        gpu.graphs.append(FakeGraph(gpu))
        return gpu.graphs[-1]

    stream = SimpleNamespace(wait_stream=lambda _: None, synchronize=gpu.wait)
    properties = SimpleNamespace(
        name="fake", major=gpu.capability[0], minor=gpu.capability[1], multi_processor_count=132, total_memory=80 << 30
    )
    event = SimpleNamespace(record=lambda *_: None, synchronize=gpu.wait, elapsed_time=lambda _: 1.0)
    for name, value in {
        "Stream": lambda *_: stream, "current_stream": lambda *_: stream, "stream": lambda _: contextlib.nullcontext(),
        "Event": lambda **_: event, "CUDAGraph": graph, "graph": capture, "graph_pool_handle": lambda: (0, 0),
        "get_device_capability": lambda *_: gpu.capability, "get_device_properties": lambda *_: properties,
        "get_device_name": lambda *_: "fake", "mem_get_info": lambda *_: (40 << 30, 80 << 30),
        "empty_cache": lambda: None, "device_count": lambda: 1, "is_available": lambda: True,
        "synchronize": lambda *_: gpu.wait(),
        "reset_peak_memory_stats": lambda *_: None, "max_memory_allocated": lambda *_: 0,
        "current_device": lambda: 0, "set_device": lambda _: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
