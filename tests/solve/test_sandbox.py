"""Breaking out of the sandbox: every attack runs inside several sets of walls, and once inside none, where it works."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from trtkit.errors import UnsupportedError, UsageError
from trtkit.solve.sandbox import Call, CallResult, Sandbox, SandboxOptions, Strength, sandbox_strength
from trtkit.solve.sandbox_jail import LAYERS
from trtkit.solve.sandbox_seccomp import program

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")

WALLS = {
    "all": LAYERS,
    # What is left in a container that does not allow user namespaces.
    "no namespaces": ("landlock", "seccomp"),
    # A processor whose system calls are not known here, and an old kernel.
    "namespaces only": ("namespaces", "root"),
}
LONG, SHORT = SandboxOptions(seconds=30, unsafe=True), SandboxOptions(seconds=0.5, unsafe=True)
HELP = """
import ctypes, mmap, os, resource, signal, socket, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def call(*arguments):
    if libc.syscall(*arguments) < 0:
        raise OSError(ctypes.get_errno(), "refused")
def attempt(action):
    try:
        action()
    except BaseException:
        return
    print("ESCAPED", end=" ")
"""


def run(sandbox: Sandbox, code: str, earlier: Sequence[str] = ()) -> CallResult:
    sandbox.submit(Call(id="x", code=code, earlier=tuple(earlier)))
    return wait(sandbox)[0]


def wait(sandbox: Sandbox) -> list[CallResult]:
    found: list[CallResult] = []
    while sandbox.pending:
        found += sandbox.ready(30)
    return found


def lives(sandbox: Sandbox) -> bool:
    """It still runs code; half a second may be too short for that where the machine is busy."""
    return any(run(sandbox, "print(6 * 7)").output == "42\n" for _ in range(20))


def open_sandbox(layers: Sequence[str], options: SandboxOptions = LONG) -> Sandbox:
    sandbox = Sandbox(options, workers=2, layers=layers)
    if sandbox.strength.layers != tuple(layers):
        sandbox.close()
        pytest.skip(f"not on this machine: {sandbox.strength.missing}")
    return sandbox


@pytest.fixture(scope="module", params=list(WALLS))
def walled(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with open_sandbox(WALLS[request.param]) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def strong() -> Iterator[Sandbox]:
    with open_sandbox(LAYERS) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def naked() -> Iterator[Sandbox]:
    with Sandbox(LONG, layers=()) as sandbox:
        yield sandbox


@pytest.fixture(scope="module", params=["no namespaces", "namespaces only"])
def hasty(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with open_sandbox(WALLS[request.param], SHORT) as sandbox:
        yield sandbox


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
                reach()  # type: ignore[no-untyped-call]
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


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "time.sleep(1000)",
        "os.kill(os.getpid(), signal.SIGSTOP)\nwhile True: pass",
        "[signal.signal(n, signal.SIG_IGN) for n in (1, 2, 3, 15)]\nwhile True: time.sleep(1)",
        "while True:\n  try: os.fork()\n  except OSError: pass",
        "while True:\n  try: threading.Thread(target=time.sleep, args=(9,)).start()\n  except Exception: pass",
    ],
    ids=["loop", "sleep", "stopped", "deaf", "fork bomb", "thread bomb"],
)
def test_code_that_does_not_end_is_ended(hasty: Sandbox, code: str) -> None:
    hasty.submit(Call(id="x", code=HELP + code))
    assert hasty.ready() == [], "to ask does not mean to wait"
    [result] = wait(hasty)
    assert result.status == "timeout"
    assert lives(hasty)
    assert processes_of(hasty) == 0


DAEMON = """
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.close(1), os.close(2)
            while True: time.sleep(1)
        os._exit(0)
time.sleep(0.1)
print("left behind", flush=True)
"""


@pytest.mark.parametrize("walls", [("namespaces", "root"), ("landlock",), ()])
def test_what_a_call_leaves_behind_dies_with_it(walls: Sequence[str]) -> None:
    with open_sandbox(walls) as sandbox:
        assert run(sandbox, HELP + DAEMON).output == "left behind\n"
        assert processes_of(sandbox) == 0


def processes_of(sandbox: Sandbox) -> int:
    """Processes that share the server's command line, which names its arguments, beside the server."""
    link = sandbox._link
    assert link is not None
    server = link._process.pid
    line = Path(f"/proc/{server}/cmdline").read_bytes()
    found = 0
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            ours = (entry / "cmdline").read_bytes() == line and int(entry.name) != server
            parents = parents_of(int(entry.name))
            found += ours and (server in parents or parents[0] == 1)
    return found


def parents_of(process: int) -> list[int]:
    parents = []
    while process > 1:
        process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        parents.append(process)
    return parents


@pytest.mark.parametrize(
    "code",
    [
        "x = []\nwhile True: x.append(bytes(1 << 20))",
        "import numpy\nnumpy.ones(1 << 40)",
        "x = bytearray(1 << 33)",
        "x = mmap.mmap(-1, 1 << 33)\nx[:] = b'x' * (1 << 33)",
        "10 ** 10 ** 10 % 7 and [0] * 10 ** 12",
    ],
)
def test_memory_is_limited(hasty: Sandbox, code: str) -> None:
    result = run(hasty, HELP + code)
    assert result.status in ("error", "timeout")
    if result.status == "error":
        assert "Error" in result.errors
    assert lives(hasty)


def test_memory_counts_even_when_it_is_not_used(strong: Sandbox) -> None:
    assert run(strong, "x = bytearray(1 << 25)").status == "ok"
    for code in ("x = bytearray(1 << 30)", "import numpy\nx = numpy.zeros(1 << 27)"):
        assert "MemoryError" in run(strong, code).errors


def test_the_folder_is_small_and_new_each_time(strong: Sandbox) -> None:
    fill = "n = 0\nwhile True:\n  n += 1\n  open(str(n), 'wb').write(bytes(1 << 20))"
    result = run(strong, fill)
    assert result.status == "error"
    assert "No space left" in result.errors
    assert run(strong, "import os; os.listdir('.')").output == "[]\n"
    assert run(strong, "open('big', 'wb').write(bytes(1 << 26))").status == "error"
    assert run(strong, "open('a', 'w').write('b'); print(open('a').read())").output == "b\n"


@pytest.mark.parametrize("stream", ["sys.stdout", "sys.stderr"])
def test_endless_output_is_cut(strong: Sandbox, stream: str) -> None:
    result = run(strong, f"import sys\nwhile True: print('x' * 99, file={stream})")
    assert result.status == "cut"
    assert 200 < len(result.output + result.errors) < 2000


def test_libraries_are_there_and_cannot_be_changed(strong: Sandbox) -> None:
    assert run(strong, "import sympy; x = sympy.Symbol('x'); sympy.factor(x**2 - 1)").output == "(x - 1)*(x + 1)\n"
    assert run(strong, "import numpy as np; print(np.linalg.det(np.eye(3)))").output == "1.0\n"
    assert run(strong, "import sqlite3, lzma, html.parser, unittest; print(1)").output == "1\n"
    if sys.prefix != sys.base_prefix:
        for module in ("torch", "trtkit.chat", "pytest"):
            assert "ModuleNotFoundError" in run(strong, f"import {module}").errors
    spoil = "import numpy, os; open(os.path.dirname(numpy.__file__) + '/new', 'w')"
    assert run(strong, spoil).status == "error"


def test_errors_are_short_and_name_the_line(strong: Sandbox) -> None:
    def error(code: str, *earlier: str) -> str:
        result = run(strong, code, earlier)
        assert result.status == "error"
        return result.errors

    assert error("x = 1\ny = x / 0") == "ZeroDivisionError: division by zero\n  line 2: y = x / 0\n"
    assert error("def f(:\n  pass") == "SyntaxError: invalid syntax\n  line 1: def f(:\n"
    assert error("f(0)", "def f(x):\n\n\n  return 1 / x") == "ZeroDivisionError: division by zero\n  line 1: f(0)\n"
    assert error("def f(n): return f(n + 1)\nf(0)").startswith("RecursionError: maximum")
    assert error("input()").startswith("EOFError")
    assert error("class Bad(Exception):\n  def __str__(self): return 1 / 0\nraise Bad") == "Bad\n"
    assert error("print('before')\nimport sys; sys.exit('why')") == "why\n"
    assert run(strong, "print(1)\nexit()").output == "1\n"
    assert run(strong, "import ctypes; ctypes.string_at(0)").status == "killed"
    assert run(strong, "x = '\udcff\x00'").status == "error"


def test_earlier_blocks_are_run_again_in_silence(strong: Sandbox) -> None:
    earlier = ("import math\nx = 5\nprint('seen?')", "def f(y): return x * y\nx")
    result = run(strong, "print(f(math.gcd(4, 6)))", earlier)
    assert (result.status, result.output, result.errors) == ("ok", "10\n", "")


def test_earlier_blocks_cannot_take_more_time_than_they_may(hasty: Sandbox) -> None:
    assert run(hasty, "print(1)", ["while True: pass"]).status == "timeout"
    cheat = "import os, time\nos.close(3)\ntime.sleep(100)"
    assert run(hasty, "print(1)", [cheat]).status == "timeout"


def test_equal_code_says_equal_things(strong: Sandbox) -> None:
    code = (
        "import random, numpy, sympy, sympy.core.random as r\n"
        "print(random.random(), numpy.random.rand(), r.random(), set('abcdef'), sympy.symbols('a b c'))"
    )
    with open_sandbox(LAYERS) as other:
        assert run(strong, code).output == run(strong, code).output == run(other, code).output != ""


def test_calls_overlap_and_can_be_dropped() -> None:
    with open_sandbox(LAYERS, SandboxOptions(seconds=60)) as sandbox:
        for name in ("a", "b", "c"):
            sandbox.submit(Call(id=name, code="import time\nwhile True: time.sleep(1)"))
        sandbox.drop("a")
        sandbox.submit(Call(id="quick", code="print('done')"))
        sandbox.drop("c")
        assert [(result.id, result.output) for result in sandbox.ready(60)] == [("quick", "done\n")]
        assert sandbox.pending == 1
        sandbox.submit(Call(id="a", code="print('again')"))
        assert [(result.id, result.output) for result in sandbox.ready(60)] == [("a", "again\n")]


def test_a_lost_server_is_replaced() -> None:
    with open_sandbox(LAYERS) as sandbox:
        sandbox.submit(Call(id="a", code="while True: pass"))
        assert sandbox._link is not None
        os.kill(sandbox._link._process.pid, signal.SIGKILL)
        [result] = wait(sandbox)
        assert (result.id, result.status) == ("a", "broken")
        assert run(sandbox, "print(1)").output == "1\n"


def test_nothing_is_left_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with open_sandbox(WALLS["no namespaces"]) as sandbox:
        run(sandbox, "open('mine', 'w').write('x')")
        sandbox.submit(Call(id="x", code="open('mine', 'w').write('x')\nwhile True: pass"))
        assert len(os.listdir(tmp_path)) == 1
    assert os.listdir(tmp_path) == []


def test_strength_is_measured() -> None:
    with Sandbox(LONG, layers=()) as none:
        assert none.strength.held == ()
        assert not none.strength.sufficient
        assert none.strength.text == "holds nothing; layers: none"
    with pytest.raises(UnsupportedError, match="--tools-unsafe"):
        Sandbox(layers=())
    with pytest.raises(UnsupportedError):
        Sandbox(layers=("landlock",))  # no UDP rule, no rule for modes
    found = sandbox_strength()
    assert isinstance(found, Strength)
    assert set(found.layers) | set(found.missing) == set(LAYERS)


def test_limits_that_make_no_sense() -> None:
    with pytest.raises(UsageError) as caught:
        SandboxOptions(calls=0, seconds=0, memory_bytes=1, output_characters=0)
    assert len(caught.value.offenders) == 4


Verdict = Callable[[int, int, tuple[int, ...]], int]


def verdict_of(machine: str) -> Verdict:
    """An interpreter of the filter, as linux/filter.h describes it."""
    code = program(machine, 77)

    def verdict(arch: int, number: int, arguments: tuple[int, ...] = ()) -> int:
        words = {0: number, 4: arch, **{16 + 8 * place: value & 0xFFFFFFFF for place, value in enumerate(arguments)}}
        at = accumulator = 0
        while True:
            operation, yes, no, operand = code[at]
            at += 1
            if operation == 0x06:
                return operand
            if operation == 0x20:
                accumulator = words[operand]
            elif operation == 0x54:
                accumulator &= operand
            else:
                truth = {
                    0x15: accumulator == operand,
                    0x25: accumulator > operand,
                    0x35: accumulator >= operand,
                    0x45: bool(accumulator & operand),
                }[operation]
                at += yes if truth else no

    return verdict  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("machine", "arch", "read", "refused", "openat", "kill"),
    [
        # socket, connect, clone, execve, ptrace, setsid, chmod, prctl, shmget, io_uring_setup is new
        ("x86_64", 0xC000003E, 0, (41, 42, 56, 57, 59, 101, 112, 90, 157, 29), 257, 62),
        ("aarch64", 0xC00000B7, 63, (198, 203, 220, 221, 117, 157, 53, 167, 194), 56, 129),
    ],
)
def test_the_filter_on_both_processors(
    machine: str, arch: int, read: int, refused: Sequence[int], openat: int, kill: int
) -> None:
    verdict = verdict_of(machine)
    allow, deny, unknown, end = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
    assert verdict(arch, read, ()) == allow
    assert {verdict(arch, number, (0, 0, 0)) for number in refused} == {deny}
    assert verdict(arch, 425, ()) == unknown
    assert verdict(arch, 0x40000000 + read, ()) in (deny, unknown)
    assert verdict(0x40000003, read, ()) == end, "32-bit calls have other numbers"
    trunc, write, both = os.O_TRUNC, os.O_WRONLY, os.O_RDWR
    flags = {0: allow, write: allow, write | trunc: allow, both | trunc: allow, trunc: deny, 3 | trunc: deny}
    assert {each: verdict(arch, openat, (0, 0, each)) for each in flags} == flags
    assert [verdict(arch, kill, (who, 9)) for who in (77, 78, 0, -1, -77)] == [allow, deny, deny, deny, deny]
