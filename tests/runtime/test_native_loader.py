"""The library of the C++ kernels: compiled by one process for all that want it."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from trtkit.locks import in_turn
from trtkit.runtime.native import loader


def test_of_several_that_want_it_one_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "kernels" / "kernels.so"
    compiled: list[str] = []
    all_here = threading.Barrier(3, timeout=30)

    def looked_up() -> str:
        all_here.wait()  # each has seen that there is no library
        return "c++"

    def compile(compiler: str, place: Path) -> None:
        time.sleep(0.1)
        compiled.append(compiler)
        place.write_bytes(b"")

    monkeypatch.setattr(loader, "library_path", lambda: target)
    monkeypatch.setattr(loader, "compiler_path", looked_up)
    monkeypatch.setattr(loader, "_compile", compile)
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda _: loader._library(), range(3))) == [target] * 3
    assert compiled == ["c++"]


def test_a_turn_ends_when_its_holder_does(tmp_path: Path) -> None:
    seen: list[str] = []
    inside = threading.Event()

    def first() -> None:
        with in_turn(tmp_path / "lock"):
            inside.set()
            time.sleep(0.2)
            seen.append("first")

    holder = threading.Thread(target=first)
    holder.start()
    assert inside.wait(30)
    with in_turn(tmp_path / "lock"):
        seen.append("second")
    holder.join()
    assert seen == ["first", "second"]
