"""The shell around the verbs: errors, exit codes, help, what is imported."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer

from trtkit import __version__
from trtkit.chat import VARIANTS
from trtkit.cli import app as module
from trtkit.cli.__main__ import main
from trtkit.cli.app import app, run
from trtkit.cli.output import table
from trtkit.errors import CapacityError

COMMAND = [sys.executable, "-m", "trtkit.cli"]
VERBS = ("build", "solve", "revote", "plan", "doctor", "inspect", "bench")


def test_help_and_import_need_no_torch() -> None:
    code = (
        "import sys\nimport trtkit\nfrom trtkit.cli.app import run\n"
        "codes = [run(['--help']), *(run([verb, '--help']) for verb in sys.argv[1:])]\n"
        "heavy = {'torch', 'transformers', 'numpy', 'sympy'} & sys.modules.keys()\n"
        "sys.exit(f'{codes} {heavy}' if any(codes) or heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *VERBS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for verb in VERBS:
        assert f"Usage: trtkit {verb}" in done.stdout


def test_no_verb_shows_the_help_and_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("Usage: trtkit")
    assert "train-drafter" in shown.err
    assert shown.out == ""


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"trtkit {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["solv"], 2, "No such command 'solv'"),
        (["plan", "--gpu", "l44"], 2, "did you mean"),
        (["plan", "--lenght", "3"], 2, "--lenght"),
        (["plan", "--length", "0"], 2, "--length"),
        (["plan", "--model", "no-such-model"], 2, "unknown model"),
        (["plan", "--gpu", "l4", "--model", "fast-math-qwen3-14b", "--length", "99999"], 2, "40960"),
        (["solve"], 2, "Missing argument"),
        (["build", "--precision", "fp88"], 2, "did you mean 'fp8'"),
        (["build", "--precision", "fp8", "--gpu", "a100"], 1, "compute capability 8.9"),
        (["build", "--backend", "tensorrt-llm"], 1, "none was named"),
        (["build", "--backend", "x", "--int4-method", "y"], 2, "--int4-method 'y'"),
        (["inspect", "no-such-directory"], 1, "no such directory"),
        (["bench", "--engine", "no-such-directory"], 1, "not an engine directory"),
    ],
)
def test_wrong_usage_gets_a_message_and_no_traceback(
    arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == code
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert said in captured.err
    assert "hint: " in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def raising(monkeypatch: pytest.MonkeyPatch, problem: BaseException) -> None:
    def fail(*_: object, **__: object) -> None:
        raise problem

    monkeypatch.setattr(module, "app", fail)
    monkeypatch.setattr(fail, "registered_commands", [], raising=False)


def test_the_traceback_comes_with_debug_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(monkeypatch, CapacityError("too big", where="here", offenders=["a", "b"], hint="less"))
    assert run(["plan"]) == 1
    assert capsys.readouterr().err == "error: here: too big\n  - a\n  - b\nhint:  less\n"
    assert run(["plan", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("problem", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "goes on from there"),
        (OSError(28, "No space left on device", "/x"), 1, "/x: No space left on device\nhint:  free some space"),
        (OSError("connection lost"), 1, "error: connection lost\nhint:  run again with --debug"),
        (MemoryError(), 1, "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory."), 1, "error: CUDA out of memory.\nhint:  use a smaller --batch"),
        (ZeroDivisionError("oops"), 1, "--debug"),
    ],
)
def test_anything_else_is_told_in_words(
    problem: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(monkeypatch, problem)
    assert run(["solve"]) == code
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err


def test_global_options_may_follow_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--gpu", "l4", "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["gpu"] == "l4"


def test_a_closed_pipe_is_quiet() -> None:
    code = "import sys; from trtkit.cli.app import run; print('x' * 200000); sys.exit(run(['plan', '--gpu', 'l4']))"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    child.wait(timeout=60)
    err = child.stderr.read()
    child.stderr.close()
    # The print above stands outside of run; what matters is that nothing comes from the verb itself.
    assert b"error:" not in err


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_says_what_next() -> None:
    code = (
        "import signal, sys, time\nfrom trtkit.cli import app, build\n"
        # Whoever runs the tests in the background has them ignore it.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def wait(*_):\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "build._check_names = wait\nsys.exit(app.run(['build']))"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=30)
    assert child.returncode == 130
    assert err.startswith("error: interrupted\nhint:  nothing half-made was kept")


def test_the_documents_know_every_option_and_no_other() -> None:
    text = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## ([a-z-]+)\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE))
    commands = typer.main.get_group(app).commands
    option = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
    for verb, command in commands.items():
        known = {name for p in command.params for name in [*p.opts, *p.secondary_opts] if name.startswith("--")}
        cells = re.findall(r"^\| (`--[^|]*) \|", sections[verb], re.MULTILINE)
        assert known - {"--json"} <= set(option.findall(sections[verb])), verb
        assert set(option.findall(" ".join(cells))) <= known, verb


def test_help_names_every_prompt_variant(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["solve", "--help"]) == 0
    assert ", ".join(VARIANTS) in " ".join(capsys.readouterr().out.split())


def test_a_narrow_terminal_chops_no_names(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    table(("engine", "of ceiling", "remark"), [("practice-fp8", "35.3%", "one of two")], right=("of ceiling",))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "engine        of ceiling  remark"
    assert lines[1].startswith("practice-fp8       35.3%  one")


def test_ctrl_c_while_the_modules_load(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Interrupted:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "trtkit.cli.app":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "trtkit.cli.app")
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "error: interrupted\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["solve", "p.jsonl", "--engine", "e", "--top-p", "0"],
        ["solve", "p.jsonl", "--engine", "e", "--top-k", "99999999999999999999"],
        ["solve", "p.jsonl", "--engine", "e", "--top-k", "-1"],
        ["solve", "p.jsonl", "--engine", "e", "--min-p", "2"],
        ["solve", "p.jsonl", "--engine", "e", "--temperature", "nan"],
        ["bench", "--engine", "e", "--temperature", "-1"],
        ["bench", "--engine", "e", "--device", "x"],
        ["bench", "--suite", "--engine", "e"],
        ["bench", "--suite", "--profile"],
        ["bench", "--engine", "e", "--out", "o"],
        ["build", "--tree", "1x3"],
    ],
)
def test_options_out_of_range_or_without_effect_are_wrong_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2, capsys.readouterr().err
