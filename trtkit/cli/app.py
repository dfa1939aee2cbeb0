"""The command line. Each verb lives in its own module and imports what it needs when it runs."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, cast

import typer

from trtkit import __version__
from trtkit.cli import (
    bench,
    build,
    compile,
    doctor,
    export,
    inspect,
    plan,
    report,
    revote,
    serve,
    solve,
    train_difficulty,
    train_drafter,
)
from trtkit.cli.launched import is_first, let_the_first_speak
from trtkit.cli.strays import Verb, stands_bare
from trtkit.errors import TrtkitError
from trtkit.log import logger, set_up_logging

__all__ = ["app", "main", "run"]

_GLOBAL = ("--debug", "--verbose", "-v", "--quiet", "-q")
_INTERRUPTED = 130
_AFTER_INTERRUPT = {
    "solve": "what was solved is kept; the same command goes on from there",
    "build": "nothing half-made was kept; run the same command again",
    "compile": "nothing half-made was kept; run the same command again",
    "train-drafter": "finished answers and the last saved state are kept; the same command goes on from there",
}
_SEE_WHERE = "run again with --debug to see where it happened"
_SYSTEM_HINTS = {
    errno.ENOSPC: "free some space, then run the same command again",
    errno.EDQUOT: "free some space, then run the same command again",
    errno.EACCES: "check the permissions there, or choose another place",
    errno.EROFS: "choose another place: nothing can be written there",
}
# Newer typer brings its own copy of click, older typer uses the package: take the classes from typer itself.
_UsageProblem = cast("type[typer.BadParameter]", typer.BadParameter.__bases__[0])
_ClickProblem = cast("type[typer.BadParameter]", _UsageProblem.__bases__[0])

app = typer.Typer(
    name="trtkit", no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip


def _version(asked: bool) -> None:
    if asked:
        print(f"trtkit {__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more, on stderr.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Log warnings only, no progress.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """From a Fast-Math checkpoint to majority-voted answers: build an engine, solve problems with it.

    Start with: trtkit build --precision fp8, then trtkit solve problems.jsonl.
    Results go to stdout, progress and logs to stderr.
    Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
    """
    set_up_logging(verbose=verbose or debug, quiet=quiet)
    if not (is_first() or verbose or debug):
        logger.setLevel(logging.ERROR)  # the first process logs the same


for _module in (
    build, compile, export, train_drafter, train_difficulty, solve, serve, revote, report, plan, doctor, inspect, bench,
):  # fmt: skip
    _name = _module.__name__.rpartition(".")[2].replace("_", "-")
    app.command(_name, cls=Verb, context_settings={"allow_extra_args": True})(_module.command)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code. Errors become ``error:`` and ``hint:`` on stderr."""
    arguments = _globals_first(arguments)
    debug = "--debug" in arguments
    verb = next((word for word in arguments if not word.startswith("-")), "")
    if isinstance(sys.stdout, io.TextIOWrapper):  # where a terminal or a pipe knows no Unicode, as stderr does
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = app(args=arguments, prog_name="trtkit", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (head, less) went away: nothing to say, and nothing to flush at exit either.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except Exception as problem:
        if debug and not isinstance(problem, _ClickProblem):
            traceback.print_exc()
        if not arguments and isinstance(problem, _ClickProblem):  # click's way to say: no verb, so here is the help
            sys.stderr.write(f"{problem.format_message()}\n")
            return 2
        return _report(problem, verb)
    # Newer typer turns Ctrl-C into an exit with this code, older typer raises Abort.
    if code == _INTERRUPTED and is_first():
        _complain("interrupted", _AFTER_INTERRUPT.get(verb, "run the same command again"))
    return code if isinstance(code, int) else 0


def _report(problem: Exception, verb: str) -> int:
    """Say what went wrong in words; the exit code."""
    if isinstance(problem, TrtkitError):
        first, _, hint = str(problem).partition("\nhint: ") if problem.hint else (str(problem), "", "")
        _complain(first, hint)
        return problem.exit_code
    if isinstance(problem, _ClickProblem):
        known = verb if any(verb == command.name for command in app.registered_commands) else ""
        option = getattr(problem, "option_name", None)  # of an option that there is not
        bare = stands_bare(problem.ctx, option) if option and problem.ctx else None
        if bare:
            _complain(f"No such option: {option}", bare)
        else:
            _complain(problem.format_message(), " ".join(f"see: trtkit {known} --help".split()))
        return 2 if isinstance(problem, _UsageProblem) else 1
    if isinstance(problem, MemoryError):
        _complain("out of memory", "use a smaller --batch or a smaller precision, or free memory")
    elif type(problem).__name__ == "OutOfMemoryError":  # torch's own, of a GPU; not every verb loads torch
        _complain(str(problem), "use a smaller --batch, --tree or precision, or free memory on that GPU")
    elif isinstance(problem, OSError):
        where = f"{problem.filename}: " if problem.filename and problem.strerror else ""
        _complain(f"{where}{problem.strerror or problem}", _SYSTEM_HINTS.get(problem.errno or 0, _SEE_WHERE))
    else:
        _complain(f"{type(problem).__name__}: {problem}", _SEE_WHERE)
    return 1


def _globals_first(arguments: Sequence[str]) -> list[str]:
    """Let the global options stand anywhere before ``--``, as people type them."""
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    before, after = list(arguments[:end]), list(arguments[end:])
    return [word for word in before if word in _GLOBAL] + [word for word in before if word not in _GLOBAL] + after


def _complain(message: str, hint: str) -> None:
    sys.stderr.write(f"error: {let_the_first_speak()}{message}\n")
    if hint:
        sys.stderr.write(f"hint:  {hint}\n")
    sys.stderr.flush()


def main() -> None:
    """Entry point of the ``trtkit`` command."""
    sys.exit(run(sys.argv[1:]))
