"""Breaking out of the sandbox: every attack runs inside several sets of walls, and once inside none, where it works."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.solve.sandboxes import HELP, open_sandbox, run
from trtkit.solve.sandbox import Sandbox
from trtkit.solve.sandbox_jail import LAYERS

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")


@dataclass(frozen=True)
class World:
    """What there is to reach outside."""

    tcp: socket.socket
    udp: socket.socket
    directory: Path
    signals: list[int]

    @property
    def untouched(self) -> bool:
        for reach in (self.tcp.accept, lambda: self.udp.recv(9)):
            with contextlib.suppress(BlockingIOError):
                reach()
                return False
        file = self.directory / "journal.jsonl"
        same = file.read_text() == "secret" and file.stat().st_mode & 0o777 == 0o600
        return same and os.listdir(self.directory) == ["journal.jsonl"] and not self.signals


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    (tmp_path / "journal.jsonl").write_text("secret")
    (tmp_path / "journal.jsonl").chmod(0o600)
    signals: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: signals.append(number))
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
    ):
        udp.bind(("127.0.0.1", 0))
        tcp.setblocking(False)
        udp.setblocking(False)
        yield World(tcp=tcp, udp=udp, directory=tmp_path, signals=signals)
    signal.signal(signal.SIGUSR1, before)


# Each is tried on its own. {file} lies outside, {directory} holds it, {parent} runs the sandbox.
ATTACKS = {
    "tcp": "socket.create_connection(('127.0.0.1', {tcp}), 5)",
    "udp": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {udp}))",
    "read the run directory": "open('{file}').read()",
    "read users": "open('/etc/passwd').read()",
    "read the parent's environment": "open('/proc/{parent}/environ').read()",
    "read by symlink": "[os.symlink('{file}', 'link'), open('link').read()]",
    "read by way of a library": "open(os.path.dirname(os.__file__) + '/..' * 12 + '{file}').read()",
    "list": "os.listdir('{directory}')",
    "open by system call": "call(2 if os.uname().machine == 'x86_64' else 1e9, b'{file}', 0)",
    "write": "open('{directory}/new', 'w').write('x')",
    "append": "open('{file}', 'a').write('x')",
    "empty by reading": "os.open('{file}', os.O_RDONLY | os.O_TRUNC)",
    "truncate": "os.truncate('{file}', 0)",
    "change the mode": "os.chmod('{file}', 0)",
    "rename": "os.rename('{file}', '{directory}/other')",
    "move in": "os.rename('{file}', 'mine')",
    "link in": "os.link('{file}', 'mine')",
    "remove": "os.remove('{file}')",
    "signal the parent": "os.kill({parent}, signal.SIGUSR1)",
    "signal by system call": "call(234, {parent}, {parent}, 10)",
    "pidfd": "os.pidfd_open({parent})",
}


def attack(world: World, name: str) -> str:
    places = {
        "tcp": world.tcp.getsockname()[1],
        "udp": world.udp.getsockname()[1],
        "file": world.directory / "journal.jsonl",
        "directory": world.directory,
        "parent": os.getpid(),
    }
    return f"{HELP}\nattempt(lambda: {ATTACKS[name].format(**places)})"


@pytest.mark.parametrize("name", ATTACKS)
def test_no_way_out(walled: Sandbox, world: World, name: str) -> None:
    result = run(walled, attack(world, name))
    assert (result.status, result.output) == ("ok", "")
    assert world.untouched


@pytest.mark.parametrize("name", ATTACKS)
def test_the_attacks_work_where_there_is_no_wall(naked: Sandbox, world: World, name: str) -> None:
    if name == "open by system call" and os.uname().machine != "x86_64":
        pytest.skip("has no such call")
    if name == "read the parent's environment":
        pytest.skip("the kernel refuses it where the parent has privileges that the code has lost")
    assert run(naked, attack(world, name)).output == "ESCAPED "


def test_no_privileges_are_left(walled: Sandbox) -> None:
    """Those over the own namespaces would do to undo them."""
    remount = "call(165, None, os.path.dirname(os.__file__).encode(), None, 4096 | 32, None)"
    for action in ("os.chroot('.')", "socket.sethostname('x')", remount):
        assert run(walled, f"{HELP}\nattempt(lambda: {action})").output == ""


@pytest.mark.parametrize(
    "action",
    [
        "os.fork()",
        "subprocess.run(['/bin/true'])",
        "os.execv('/bin/true', ['true'])",
        "threading.Thread(target=print).start()",
        "call(56, 17, 0, 0, 0, 0)",
        "call(435, 0, 0)",
        "call(101, 16, 1, 0, 0)",
        "call(319, b'x', 0)",
        "call(272, 0x10000000)",
        "socket.socket(socket.AF_UNIX)",
        "socket.socketpair()",
        "os.pipe()",
        "os.kill(-1, 9)",
        "os.killpg(0, 9)",
        "os.nice(-1)",
        "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "resource.prlimit(os.getppid(), resource.RLIMIT_AS, (-1, -1))",
        "os.mkfifo('pipe')",
        "os.symlink('a', 'b')",
        "os.setsid()",
    ],
)
def test_the_filter_leaves_only_computing(strong: Sandbox, action: str) -> None:
    result = run(strong, f"{HELP}\nattempt(lambda: {action})")
    assert (result.status, result.output) == ("ok", "")


def test_nothing_is_inherited(
    monkeypatch: pytest.MonkeyPatch, world: World, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hf_xyzzy")
    with open(world.directory / "journal.jsonl") as file, open_sandbox(LAYERS) as sandbox:
        os.set_inheritable(file.fileno(), True)
        result = run(
            sandbox,
            f"""{HELP}
print(sorted(os.environ), libc.getenv(b'SECRET_TOKEN'), libc.getenv(b'PYTHONPATH'), end=' ')
def is_open(number):
    try:
        os.fstat(number)
    except OSError:
        return False
    return True
print([number for number in range(1000) if is_open(number)], sys.stdin.read() == '', os.listdir('.'))""",
        )
    assert result.output == "['HOME', 'PYTHONHASHSEED', 'TMPDIR'] 0 0 [0, 1, 2] True []\n", result
    with open_sandbox(()) as sandbox:  # what the process was started with stays in its memory
        seen = run(sandbox, "text = open('/proc/self/environ').read()\nprint('PYTHONPATH=' in text, 'SECRET' in text)")
    assert seen.output == "True False\n"
