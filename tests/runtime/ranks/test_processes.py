"""Real processes: the same tokens, whoever fails is named, and nobody is left behind."""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from drafter.checkpoint import save_drafter
from drafter.config import DrafterConfig, TreeShape
from drafter.model import Drafter
from tests.engines import random_prompts, request, run_all, tiny_engine_dir
from tests.examples import slow
from tests.runtime.ranks.apart import open_apart
from trtkit.errors import EngineError, RequestError, UnsupportedError, UsageError
from trtkit.recipe import Recipe
from trtkit.runtime import load
from trtkit.runtime.api import Engine
from trtkit.runtime.load import OpenOptions, open_engine, rank_count
from trtkit.runtime.ranks import group
from trtkit.runtime.ranks.crew import CLOSE
from trtkit.runtime.ranks.engine import RankedEngine
from trtkit.runtime.ranks.group import Place, ProcessRanks, joined

VOCAB = 12


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_engine_dir(tmp_path_factory.mktemp("engine"), vocab_size=VOCAB)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    made = tmp_path_factory.mktemp("head")
    save_drafter(Drafter(DrafterConfig(hidden_size=256, vocab_size=VOCAB, exit_dim=32)), made, dtype=torch.float32)
    return made


def _options(**more: Any) -> OpenOptions:
    return OpenOptions(**{"device": "cpu", "dtype": "float32", "threads": 1, **more})


def _children() -> list[int]:
    """Processes that this one has started, apart from those that have ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text(encoding="utf-8").rpartition(")")
        except OSError:
            continue
        state, parent, *_ = rest.split()
        if int(parent) == os.getpid() and state != "Z" and "python" in name:
            found.append(int(stat.parent.name))
    return found


@pytest.fixture
def odd_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder for temporary files with a blank in its name; a working directory with a file named like a module."""
    temporary, here = tmp_path / "a temporary é", tmp_path / "here"
    temporary.mkdir()
    here.mkdir()
    (here / "queue.py").write_text("raise SystemExit('taken for the module')")
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.chdir(here)


@pytest.mark.usefixtures("odd_places")
def test_two_processes_emit_what_one_does_and_a_dead_one_is_an_error(directory: Path, head: Path) -> None:
    """And what is refused along the way ends nobody. No process stays."""
    before = set(_children())
    prompts = random_prompts(1, [3, 20, 33], vocab=VOCAB)
    requests = [request(str(i), p, seed=i, max_tokens=40, temperature=i / 2) for i, p in enumerate(prompts)]
    with open_engine(directory, _options()) as engine:
        plain = run_all(engine, requests)
    wide = TreeShape(beams=3, length=2)
    with open_engine(directory, _options(drafter=head, tree=wide, tensor_parallel=2)) as engine:
        assert isinstance(engine, RankedEngine)
        with pytest.raises(RequestError, match="outside the vocabulary"):  # the other rank lives on
            engine.submit(request("bad", (VOCAB,)))
        assert run_all(engine, requests) == plain
        stats = engine.stats()
        assert stats.accepted_by_depth[0] > 0
        assert stats.kv_blocks_free == stats.kv_blocks
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(subprocess, "Popen", None)  # no process is started for it
            with pytest.raises(EngineError, match=r"torch.distributed is in use"):
                open_engine(directory, _options(tensor_parallel=2))

        (other,) = set(_children()) - before
        for one in requests:
            engine.submit(dataclasses.replace(one, id=f"again {one.id}"))
        engine.step()
        os.kill(other, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(EngineError, match=r"rank 1: its process was ended by SIGKILL \(memory may have run out\)"):
            _run_on(engine)
        engine.submit(request("more", (1,)))  # who asks now finds out as the others did, in the next step
        with pytest.raises(EngineError, match="SIGKILL"):
            engine.step()
        assert time.monotonic() - began < 60
    assert set(_children()) <= before
    assert not dist.is_initialized()


def _run_on(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


def test_a_rank_that_cannot_open_says_why(directory: Path, tmp_path: Path) -> None:
    """The first one is in the middle of meeting it."""
    before = set(_children())
    with pytest.raises(EngineError, match=r"rank 1: .*nowhere") as failed:
        RankedEngine(2, "cpu", functools.partial(open_apart, directory, tmp_path / "nowhere"))
    assert "--verbose" not in str(failed.value)  # a refusal needs no traceback
    assert set(_children()) <= before
    with pytest.raises(MemoryError, match="here"):
        RankedEngine(2, "cpu", functools.partial(open_apart, None, directory))
    assert set(_children()) <= before
    assert not dist.is_initialized()


@pytest.mark.slow
def test_after_a_step_that_was_cut_short_the_ranks_go_no_further(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C, or memory that ran out on the first rank alone: the others have gone on to other exchanges."""
    before, threads = set(_children()), torch.get_num_threads()
    torch.set_num_threads(4)
    real = ProcessRanks.sum
    with open_engine(directory, _options(tensor_parallel=2, threads=None)) as engine:
        assert isinstance(engine, RankedEngine)
        assert torch.get_num_threads() == 2  # of four, shared out over two ranks
        engine.submit(request("a", (1, 2, 3), max_tokens=200))
        for process in set(_children()) - before:  # sent to all of a service: the first one tells when it is over
            os.kill(process, signal.SIGTERM)
        engine.step()

        def interrupted(_ranks: ProcessRanks, _x: torch.Tensor) -> torch.Tensor:
            raise KeyboardInterrupt

        monkeypatch.setattr(ProcessRanks, "sum", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
        monkeypatch.setattr(ProcessRanks, "sum", real)
        engine.cancel("a")
        engine.submit(request("b", (1, 2, 3)))
        with pytest.raises(EngineError, match="cut short"):
            engine.step()
        began = time.monotonic()
    assert time.monotonic() - began < 9  # nobody had to be killed
    assert torch.get_num_threads() == 4
    torch.set_num_threads(threads)
    assert set(_children()) <= before


@pytest.mark.slow
def test_what_a_step_brought_without_a_rank_is_not_believed(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs an exchange that is aborted returns, with whatever lies in memory."""
    real = ProcessRanks.sum
    with open_engine(directory, _options(tensor_parallel=2)) as engine:
        assert isinstance(engine, RankedEngine)
        engine.submit(request("a", (1, 2, 3), max_tokens=200))
        engine.step()
        crew = engine._crew

        def released(ranks: ProcessRanks, x: torch.Tensor) -> torch.Tensor:
            crew._failure = "rank 1: gone"
            return real(ranks, x)

        monkeypatch.setattr(ProcessRanks, "sum", released)
        with pytest.raises(EngineError, match="rank 1: gone"):
            engine.step()


@pytest.mark.slow
def test_a_rank_that_ends_before_they_meet_is_missed(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "_MEETING", timedelta(seconds=1))
    before = set(_children())

    def ended(_place: Place) -> None:
        for process in set(_children()) - before:
            os.kill(process, signal.SIGKILL)

    monkeypatch.setattr("trtkit.runtime.ranks.engine.claim", ended)
    with pytest.raises(EngineError, match="rank 1: its process was ended by SIGKILL"):
        open_engine(directory, _options(tensor_parallel=2))
    assert set(_children()) <= before


def test_without_a_python_to_start_there_are_no_ranks(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(EngineError, match="does not know its own program"):
        open_engine(directory, _options(tensor_parallel=2))
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(EngineError, match=r"cannot start the engine's processes: .*No such file"):
        open_engine(directory, _options(tensor_parallel=2))


_STUCK = """
import contextlib, time
from trtkit.runtime.ranks import worker

@contextlib.contextmanager
def joined(place, agree):
    {enter}
    yield place
    time.sleep(1000)

worker.joined, worker.FAREWELL_SECONDS = joined, 0.2
worker.main({end})
"""


@pytest.mark.parametrize("enter", [slow("pass"), "time.sleep(1000)"])
def test_a_rank_ends_though_the_others_do_not_let_it_go(enter: str) -> None:
    """A rank that failed says so first; one that is told to end does so, wherever it waits."""
    ours, theirs = socket.socketpair()
    with theirs:
        code = _STUCK.format(enter=enter, end=theirs.fileno())
        process = subprocess.Popen([sys.executable, "-c", code], pass_fds=[theirs.fileno()])
    pipe = Connection(ours.detach())
    open_own = functools.partial(open_apart, None, None)
    pipe.send((Place(rank=1, size=2, device="cpu", store=Path("store")), 30, open_own))
    assert pipe.recv().state == "ready"
    if enter == "pass":
        news = pipe.recv()
        assert (news.state, news.problem) == ("failed", "MemoryError: here")
    else:
        pipe.send(CLOSE)
    assert process.wait(60) == 1
    pipe.close()


def test_a_rank_ends_when_the_first_one_is_gone() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", f"from trtkit.runtime.ranks import worker; worker.main({theirs.fileno()})"],
            pass_fds=[theirs.fileno()],
        )
    ours.close()
    assert process.wait(60) == 1


def test_what_several_processes_cannot_run_is_refused_before_any_is_started(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "RankedEngine", None)
    with pytest.raises(UnsupportedError) as refused:
        open_engine(directory, _options(tensor_parallel=3))
    assert refused.value.offenders == ("4 attention heads", "2 KV heads")
    with pytest.raises(UsageError, match="must be at least 1"):
        OpenOptions(tensor_parallel=0)


def test_how_many_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    recipe = Recipe(model="m", precision="fp8", tensor_parallel=4)
    cpu, cuda, second = torch.device("cpu"), torch.device("cuda"), torch.device("cuda:1")
    assert [rank_count(recipe, None, device) for device in (cpu, cuda, second)] == [1, 4, 1]
    assert [rank_count(recipe, 2, device) for device in (cpu, cuda)] == [2, 2]
    assert rank_count(recipe, 1, cuda) == 1
    for device, there in ((cuda, "this machine has 4"), (second, "cuda:1 is one")):
        with pytest.raises(UsageError, match=f"--tp 8 takes as many GPUs, {there}"):
            rank_count(recipe, 8, device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert rank_count(recipe, None, cuda) == 1  # built for more than there are


def test_ranks_meet_on_this_machine_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gloo looks the host's name up unless it is told an interface; that may fail, or lead outside. And what torch does
    to the process, apart from that, is undone."""
    names = ("GLOO_SOCKET_IFNAME", "TORCH_NCCL_ASYNC_ERROR_HANDLING")
    monkeypatch.delenv(names[0], raising=False)
    monkeypatch.setenv(names[1], "1")  # as the user has it
    seen: list[str | None] = []
    real = dist.init_process_group

    def noted(*arguments: Any, **named: Any) -> None:
        seen.extend(map(os.environ.get, names))
        real(*arguments, **named)

    monkeypatch.setattr(dist, "init_process_group", noted)
    hook = sys.excepthook
    with joined(Place(rank=0, size=1, device="cpu", store=tmp_path / "store"), int) as alone:
        assert alone.least(7) == 7
        assert torch.equal(alone.sum(torch.ones(2)), torch.ones(2))
    assert seen == ["lo", "1"]
    assert sys.excepthook is hook
    assert [os.environ.get(name) for name in names] == [None, "1"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="takes two GPUs")
def test_two_gpus_emit_what_one_does(directory: Path, head: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums and gathers within CUDA graphs, steps launched ahead, and a rank that is killed while the GPUs work."""
    monkeypatch.setenv("TRTKIT_NATIVE", "1")
    prompts = random_prompts(1, [3, 20, 33], vocab=VOCAB)
    requests = [request(str(i), p, seed=i, max_tokens=90, temperature=i / 2) for i, p in enumerate(prompts)]
    with open_engine(directory, _options(device="cuda", tensor_parallel=1)) as engine:
        plain = run_all(engine, requests)
    for tree in (TreeShape(beams=1, length=3), TreeShape(beams=3, length=2), None):
        with open_engine(directory, _options(device="cuda", tensor_parallel=2, drafter=head, tree=tree)) as engine:
            assert run_all(engine, requests) == plain
            assert isinstance(engine, RankedEngine)
            assert engine.own._graphs is not None
            assert len(engine.own._graphs) > 1
    before = set(_children())
    with open_engine(directory, _options(device="cuda", tensor_parallel=2)) as engine:
        (other,) = set(_children()) - before
        for one in requests:
            engine.submit(one)
        engine.step()
        os.kill(other, signal.SIGKILL)
        with pytest.raises(EngineError, match="rank 1"):
            _run_on(engine)
