"""What code may use up in the sandbox, what it leaves behind, and what it can rely on."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import mpmath
import pytest

from tests.examples import slow
from tests.solve.sandboxes import HELP, LONG, WALLS, lives, open_sandbox, run, wait
from trtkit.errors import UnsupportedError, UsageError
from trtkit.solve.sandbox import Call, Sandbox, SandboxOptions, Strength, sandbox_strength
from trtkit.solve.sandbox_child import PACKAGES
from trtkit.solve.sandbox_jail import LAYERS, folder_place, readable_places

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")


ENDLESS = {
    "loop": "while True: pass",
    "sleep": "time.sleep(1000)",
    "stopped": "os.kill(os.getpid(), signal.SIGSTOP)\nwhile True: pass",
    "deaf": "[signal.signal(n, signal.SIG_IGN) for n in (1, 2, 3, 15)]\nwhile True: time.sleep(1)",
    "fork bomb": "while True:\n  try: os.fork()\n  except OSError: pass",
    "thread bomb": (
        "while True:\n  try: threading.Thread(target=time.sleep, args=(9,)).start()\n  except Exception: pass"
    ),
}


@pytest.mark.parametrize(
    ("hasty", "code"),
    [
        *(("no namespaces", code) for code in ("loop", "stopped", "deaf", "fork bomb", "thread bomb")),
        *(("namespaces only", code) for code in ("sleep", "deaf", "fork bomb")),
        slow("no namespaces", "sleep"),
        *(slow("namespaces only", code) for code in ("loop", "stopped", "thread bomb")),
    ],
    indirect=["hasty"],
)
def test_code_that_does_not_end_is_ended(hasty: Sandbox, code: str) -> None:
    hasty.submit(Call(id="x", code=HELP + ENDLESS[code]))
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


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of packages in /tmp, as a virtual environment there has one. Its mpmath has one module more."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        package = Path(directory) / "lib" / "mpmath"
        shutil.copytree(Path(mpmath.__file__).parent, package, ignore=shutil.ignore_patterns("tests", "__pycache__"))
        (package / "late.py").write_text("HERE = 'imported'")
        monkeypatch.setenv("PYTHONPATH", str(package.parent))
        yield package.parent


@pytest.fixture(scope="module")
def standing() -> set[str]:
    """The walls that this machine has, found without putting the file rules behind a file system."""
    found: set[str] = set()
    for walls in ("no namespaces", "namespaces only"):
        with Sandbox(LONG, layers=WALLS[walls]) as sandbox:
            found |= set(sandbox.strength.layers)
    return found


@pytest.mark.parametrize("walls", ["all", slow("no namespaces"), slow("namespaces only")])
def test_packages_in_tmp_are_there_and_nothing_else_of_it(walls: str, packages: Path, standing: set[str]) -> None:
    if not standing.issuperset(WALLS[walls]):
        pytest.skip(f"this machine has only {standing}")
    other = packages.with_name("other")
    other.write_text("secret")
    with Sandbox(LONG, layers=WALLS[walls]) as sandbox:
        assert sandbox.strength.layers == WALLS[walls], sandbox.strength.missing

        def says(code: str) -> str:
            result = run(sandbox, f"import os, tempfile, mpmath\n{code}")
            return result.output or result.errors.partition(":")[0]

        assert says("import mpmath.late; mpmath.late.HERE") == "'imported'\n"
        assert says("mpmath.__file__") == f"'{packages}/mpmath/__init__.py'\n"
        assert says("os.listdir('.')") == "[]\n"
        assert says("f = tempfile.NamedTemporaryFile(); os.path.basename(f.name) in os.listdir('.')") == "True\n"
        assert says(f"open('{other}')") in ("FileNotFoundError", "PermissionError")
        for folder in (packages, packages / "mpmath"):
            assert says(f"open('{folder}/new', 'w')") in ("OSError", "PermissionError")
        # Landlock lets nobody list the directories on the way to the packages.
        assert says(f"os.listdir('{packages.parent}')") in ("['lib']\n", "PermissionError")


def test_tmp_is_the_folder_where_no_package_lies_there(strong: Sandbox) -> None:
    if any(place.startswith("/tmp/") for place in readable_places(PACKAGES)):
        pytest.skip("this interpreter's packages lie in /tmp")
    assert run(strong, "import os; os.listdir('/tmp')").output == "[]\n"
    assert run(strong, "import os; open('/tmp/a', 'w').close(); os.listdir('.')").output == "['a']\n"


def test_the_folder_covers_no_package() -> None:
    assert folder_place(("/usr/lib", "/tmp/v/lib/numpy")) == "/folder"
    assert folder_place(("/folder/v/lib/numpy", "/folders", "/folder_")) == "/folder__"


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


@pytest.mark.parametrize("ending", ["exit()", "import sys\nsys.exit(0)", "import sys\nsys.stdout = None"])
def test_an_earlier_block_does_not_end_later_ones(strong: Sandbox, ending: str) -> None:
    first = f"x = 5\n{ending}"
    assert run(strong, first).status == "ok"  # so it is run again before the next one
    assert run(strong, "import os\nos.write(1, str(x).encode())", [first]).output.startswith("5")


def test_code_gets_no_future_imports_of_ours(strong: Sandbox) -> None:
    assert run(strong, "def f(n: int): ...\nf.__annotations__").output == "{'n': <class 'int'>}\n"


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


def test_a_call_whose_server_is_gone_before_it_is_bound_to_it_ends() -> None:
    """Nobody would end what it runs, and its server's output would stay open."""
    orphan = """
import os, time
from trtkit.solve.sandbox_jail import die_with_parent
server = os.getpid()
if os.fork() == 0:
    while os.getppid() == server: time.sleep(0.001)
    die_with_parent(server)
    print("still here")
"""
    done = subprocess.run([sys.executable, "-c", orphan], stdout=subprocess.PIPE, timeout=60, check=True)
    assert done.stdout == b""


def test_nothing_is_left_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with open_sandbox(WALLS["no namespaces"]) as sandbox:
        run(sandbox, "open('mine', 'w').write('x')")
        deep = "for _ in range(1500):\n  open('f', 'w').close()\n  os.mkdir('d')\n  os.chdir('d')"
        assert run(sandbox, f"import os\n{deep}").status == "ok", "deeper than any path, and than Python's stack"
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
