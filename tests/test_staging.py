"""Directories that appear whole or not at all."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trtkit.errors import OutputError
from trtkit.staging import staged_dir


@pytest.mark.parametrize("before", ["nothing", "empty", "full"])
def test_a_link_stays_and_what_it_points_to_is_written(tmp_path: Path, before: str) -> None:
    disk, link = tmp_path / "disk", tmp_path / "link"
    link.symlink_to(disk)
    if before != "nothing":
        disk.mkdir()
    if before == "full":
        (disk / "old").touch()
        with pytest.raises(OutputError, match="already exists"), staged_dir(link):
            pass
    with staged_dir(link, replace=before == "full") as stage:
        (stage / "new").touch()
    assert link.is_symlink()
    assert [path.name for path in disk.iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


@pytest.mark.parametrize("typed", [".", "down/..", "the full path", "a mount point"])
def test_what_cannot_give_way_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str
) -> None:
    """The stage of "." lay in it: an hour later it was its own proof that another process had been there."""
    (tmp_path / "here" / "down").mkdir(parents=True)
    target = {"the full path": tmp_path / "here", "a mount point": tmp_path / "mounted"}.get(typed, Path(typed))
    if typed == "a mount point":
        target.mkdir()
        monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == target)
    else:
        monkeypatch.chdir(tmp_path / "here")
    worked = False
    with (
        pytest.raises(OutputError, match="mount point" if typed == "a mount point" else "is where") as caught,
        staged_dir(target, replace=True),
    ):
        worked = True
    assert not worked
    assert caught.value.hint is not None
    assert caught.value.hint.endswith(f"--out {target.resolve() / 'new'}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "mounted"][: 1 + (typed == "a mount point")]


@pytest.mark.parametrize("replace", [False, True])
def test_a_file_is_no_place_for_a_directory_and_that_is_said_before_the_work(tmp_path: Path, replace: bool) -> None:
    target = tmp_path / "target"
    target.write_text("mine")
    worked = False
    with pytest.raises(OutputError, match="is a file"), staged_dir(target, replace=replace):
        worked = True
    assert not worked
    assert target.read_text() == "mine"


def test_what_another_process_wrote_in_the_meantime_stays(tmp_path: Path) -> None:
    target = tmp_path / "target"

    def write_both() -> None:
        with staged_dir(target) as stage:
            (stage / "mine").touch()
            with staged_dir(target) as other:
                (other / "theirs").touch()

    with pytest.raises(OutputError, match="another process"):
        write_both()
    assert [path.name for path in target.iterdir()] == ["theirs"]
    assert list(tmp_path.iterdir()) == [target]


def test_an_interruption_between_the_old_and_the_new_brings_the_old_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").touch()
    rename = Path.rename

    def interrupted(path: Path, to: Path) -> Path:
        if path.suffix == ".tmp":
            raise KeyboardInterrupt
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), staged_dir(target, replace=True) as stage:
        (stage / "new").touch()
    assert [path.name for path in target.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing_half_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """A lost connection left 30 GB under a hidden name; the kernel and the shell both send a SIGHUP then."""
    rmtree = shutil.rmtree

    def hung_up_again(path: Path, **more: bool) -> None:
        if number == signal.SIGHUP:
            os.kill(os.getpid(), number)
        rmtree(path, **more)

    def ended() -> None:
        with staged_dir(tmp_path / "target") as stage:
            (stage / "half").touch()
            os.kill(os.getpid(), number)

    monkeypatch.setattr("trtkit.staging.shutil.rmtree", hung_up_again)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        ended()
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(number) is before


def test_a_hang_up_that_is_ignored_stays_so(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with staged_dir(tmp_path / "target") as stage:
            (stage / "whole").touch()
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (tmp_path / "target" / "whole").is_file()


KILLED = """
import os, signal, sys
from pathlib import Path
from trtkit.staging import staged_dir
target, moment = Path(sys.argv[1]), sys.argv[2]
rename = Path.rename
def killed(path, to):
    if moment == "moving" and path.suffix == ".tmp":
        os.kill(os.getpid(), signal.SIGKILL)
    done = rename(path, to)
    if moment == "moved" and path.suffix == ".tmp":
        os.kill(os.getpid(), signal.SIGKILL)
    return done
Path.rename = killed
with staged_dir(target, replace=True) as stage:
    (stage / "theirs").touch()
    if moment == "working":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("moment", "there"), [("working", "old"), ("moving", "old"), ("moved", "theirs")])
def test_what_a_killed_process_left_is_cleared_away_by_the_next_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, moment: str, there: str
) -> None:
    """Each kill -9 left a whole engine under a hidden name, for ever."""
    target, other = tmp_path / "a", tmp_path / ".a.b.12345678.tmp"
    target.mkdir()
    (target / "old").touch()
    other.mkdir()  # of a directory "a.b"
    (tmp_path / ".a.12345678.tmp").touch()  # no directory
    ended = subprocess.run([sys.executable, "-c", KILLED, target, moment], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) > 3
    with (
        caplog.at_level(logging.INFO, "trtkit"),
        pytest.raises(OutputError, match="already exists"),
        staged_dir(target),
    ):
        pass
    assert [path.name for path in target.iterdir()] == [there]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.12345678.tmp", other.name, "a"]
    assert "left by a process that was killed" in caplog.text


def test_what_a_process_still_works_in_stays(tmp_path: Path) -> None:
    with staged_dir(tmp_path / "a") as mine:
        (mine / "mine").touch()
        with contextlib.suppress(ValueError), staged_dir(tmp_path / "a"):
            raise ValueError
        assert (mine / "mine").is_file()


@pytest.mark.parametrize("problem", [OSError("not here"), BlockingIOError("always another's")])
def test_where_locks_do_not_work_nothing_is_cleared_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: OSError
) -> None:
    def no_locks(handle: int, operation: int) -> None:
        raise problem

    monkeypatch.setattr("fcntl.flock", no_locks)
    (tmp_path / ".a.12345678.tmp").mkdir()
    with staged_dir(tmp_path / "a") as stage:
        (stage / "whole").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["whole"]
    assert (tmp_path / ".a.12345678.tmp").is_dir()
