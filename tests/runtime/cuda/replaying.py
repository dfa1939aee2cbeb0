"""CUDA graphs that are not there: what a step does is written down once and done again, with numbers, on a CPU.

As on a device, a recording has addresses and the host's numbers in it and nothing else: what the host decided while it
recorded stays decided, and memory from outside is there only while somebody keeps it. Memory that was made while it
recorded holds garbage at each replay until it is written: NaN, and -1 in whole numbers. Not seen: streams.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tests.runtime.cuda.kernel_rules import RULES
from trtkit.runtime.cuda.graphs import StepGraphs
from trtkit.runtime.cuda.step_input import StepKey

_LOOKS = {"_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select"}
_UNWRITTEN = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


@dataclass(frozen=True, eq=False)
class _Place:
    """Where a tensor lies. Does not keep its memory."""

    storage: StorageWeakRef
    layout: tuple[Any, ...]

    @classmethod
    def of(cls, x: Tensor) -> _Place:
        return cls(StorageWeakRef(x.untyped_storage()), (x.dtype, x.storage_offset(), x.shape, x.stride()))

    def tensor(self) -> Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        assert storage is not None, "a replay finds memory that has been given back"
        dtype, *where = self.layout
        return torch.empty(0, dtype=dtype).set_(storage, *where)


def _placed(arguments: Any) -> Any:
    return pytree.tree_map_only(Tensor, _Place.of, arguments)


def _found(arguments: Any) -> Any:
    return pytree.tree_map_only(_Place, _Place.tensor, arguments)


def _tensors(arguments: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]


@dataclass(eq=False)
class Recording:
    """``torch.cuda.CUDAGraph``."""

    calls: list[Callable[[], None]] = field(default_factory=list)
    own: dict[int, Tensor] = field(default_factory=dict)
    """Memory that was made while it was recorded, as bytes."""
    replays: int = 0

    def replay(self) -> None:
        self.replays += 1
        for memory in self.own.values():
            memory.fill_(255)
        for call in self.calls:
            call()

    def reset(self) -> None:
        self.calls.clear()
        self.own.clear()


class _Recorder(TorchDispatchMode):
    """Writes down every operation of torch."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.__name__.split(".")[0], kwargs or {}
        assert name not in _LOOKS, f"{name}: the host looks at numbers while a step is recorded"
        given = {x.untyped_storage()._cdata for x in _tensors((args, kwargs))}
        result = func(*args, **kwargs)
        made = [x.untyped_storage() for x in _tensors(result)]
        fresh = [storage._cdata not in given for storage in made]
        for storage, new in zip(made, fresh, strict=True):
            if new:
                self._recording.own[storage._cdata] = torch.empty(0, dtype=torch.uint8).set_(storage)
        if name in _UNWRITTEN or not (any(fresh) or func._schema.is_mutable):
            return result  # nothing is computed
        placed, targets = _placed((args, kwargs)), _placed(_tensors(result))

        def again() -> None:
            args, kwargs = _found(placed)
            for x, target, new in zip(_tensors(func(*args, **kwargs)), targets, fresh, strict=True):
                if new:
                    target.tensor().copy_(x)

        self._recording.calls.append(again)
        return result


class _Kernel:
    """In the place of a Triton kernel."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            with _disable_current_modes():
                self._kernel[grid](*args, **kwargs)
                if RecordedGraphs.recording is not None:
                    placed = _placed((args, kwargs))
                    RecordedGraphs.recording.calls.append(lambda: again(placed))

        def again(placed: Any) -> None:
            args, kwargs = _found(placed)
            self._kernel[grid](*args, **kwargs)

        return launch


class RecordedGraphs(StepGraphs):
    """Graphs of recordings, a few at a time."""

    recording: Recording | None = None
    """The one that is being made."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._captures, self._kept = True, 3
        self.recordings: list[Recording] = []

    def _warm_up(self, key: StepKey) -> None:
        contexts = self._on.contexts.clone()
        self._prepare(key.rows, key.shape)
        for _ in range(2):
            self.step(key)
        self._on.contexts.copy_(contexts)

    def _record(self, key: StepKey) -> Any:
        """Nothing has been computed once it is recorded."""
        changed = (self._in, self._out, self._scores, self._on.contexts)
        before = [x.clone() for x in changed]
        recording = RecordedGraphs.recording = Recording()
        try:
            with _Recorder(recording):
                self._advance(key)
        finally:
            RecordedGraphs.recording = None
        for x, was in zip(changed, before, strict=True):
            x.copy_(was)
        self.recordings.append(recording)
        return recording


def record_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """See the launches of Triton kernels, too."""
    from trtkit.runtime.cuda import attention, launch, pointwise, sampling

    for room in (attention, launch, pointwise, sampling):
        for name, kernel in list(vars(room).items()):
            if name in RULES:
                monkeypatch.setattr(room, name, _Kernel(kernel))
