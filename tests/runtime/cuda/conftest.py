"""Without a GPU the kernels run in Triton's interpreter; with one, the same tests run on it."""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

import pytest
import torch

from trtkit.runtime import sampling
from trtkit.runtime.native.loader import SWITCH


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What the interpreter runs here is a test of the GPU where there is one; the slow ones if they are asked for."""
    if torch.cuda.is_available():
        for item in items:
            if "device" in getattr(item, "fixturenames", ()) and item.get_closest_marker("slow") is None:
                item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests run without kernels; on a GPU these are about nothing else."""
    if torch.cuda.is_available():
        monkeypatch.delenv(SWITCH, raising=False)
        sampling._triton_runs.cache_clear()


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6 as it is calls int() on arrays of one number, which numpy refuses since 2.4, and spends most of its
    time on patching its language anew for each function that a kernel calls."""
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    patch_tensor, patch_language = interpreter._patch_lang_tensor, interpreter._patch_lang
    scopes: dict[frozenset[str], Any] = {}

    def patched_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def patched_language(fn: Any) -> Any:
        seen = [value for value in fn.__globals__.values() if inspect.ismodule(value)]
        names = frozenset(module.__name__ for module in seen if module.__name__.startswith("triton.language"))
        if names in scopes:
            return interpreter._LangPatchScope()
        scope = scopes[names] = patch_language(fn)
        if len(scopes) > 1:
            return scope
        restore = scope.restore

        def leave() -> None:
            for inner in list(scopes.values())[:0:-1]:
                inner.restore()
            scopes.clear()
            restore()

        scope.restore = leave
        return scope

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched_tensor)
    monkeypatch.setattr(interpreter, "_patch_lang", patched_language)


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run here."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
