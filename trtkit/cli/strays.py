"""Words on the command line in places where a verb reads none: what they were meant for, ready to be pasted."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typer.core import TyperCommand

from trtkit.cli.export import FORMATS
from trtkit.cli.output import quoted
from trtkit.errors import UsageError
from trtkit.gpu import profile_named
from trtkit.scheme import SCHEMES

__all__ = ["Verb", "stands_bare"]

_BARE = ""
_NAMES = ("directory", "name")
_PLACES: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "build": (("--model", _NAMES), ("--precision", ("precision",)), ("--gpu", ("gpu",)), ("--calibration", ("rows",)),
              ("--out", _NAMES)),
    "export": ((_BARE, _NAMES), ("--format", ("format",)), ("--out", _NAMES)),
    "compile": ((_BARE, _NAMES), ("--out", _NAMES)),
    "train-drafter": (("--model", _NAMES), ("--problems", ("rows",)), ("--out", _NAMES)),
    "train-difficulty": (("--data", ("directory", "name", "rows")),),
    "solve": (("--engine", ("directory",)), (_BARE, ("rows",)), (_BARE, _NAMES), ("--engine", _NAMES),
              ("--samples", ("number",))),
    "serve": ((_BARE, _NAMES), ("--port", ("number",))),
    "plan": (("--model", _NAMES), ("--gpu", ("gpu",)), ("--precision", ("precision",))),
    "bench": (("--engine", _NAMES), ("--problems", ("rows",)), ("--batch", ("number",))),
}  # fmt: skip
"""For each verb its option (or its argument, which stands bare) for each kind of word, the likeliest first."""


class Verb(TyperCommand):
    """A verb that says of a word too many where it belongs. It must be registered with ``allow_extra_args``."""

    def invoke(self, ctx: Any) -> Any:  # newer typer brings its own copy of click's types, older typer does not
        """Run the verb, unless words are left over: :class:`UsageError`."""
        if ctx.args:
            raise _strays(ctx)
        return super().invoke(ctx)


def stands_bare(context: Any, option: str) -> str | None:
    """What to write where an option was made of the verb's argument: ``serve --engine X``. None for another option."""
    for parameter in context.command.params:
        if parameter.param_type_name == "argument" and f"--{parameter.name}" == option:
            return f"it stands without an option: trtkit {context.info_name} {_shown(parameter)}"
    return None


def _strays(context: Any) -> UsageError:
    verb, extra = context.info_name, list(context.args)
    arguments = [parameter for parameter in context.command.params if parameter.param_type_name == "argument"]
    read = [str(context.params[parameter.name]) for parameter in arguments]
    message = f"`trtkit {verb}` takes options, and no word beside them"
    if arguments:
        message = f"`trtkit {verb}` takes one {_shown(arguments[0])}, and that is {read[0]}"
    given = [parameter for parameter in context.command.params if _was_given(context, parameter)]
    meant = _meant(context, [*read, *extra], given)
    if meant is not None:
        hint = f"did you mean: trtkit {verb} {meant}" + (" ..." if given else "")
    elif verb == "doctor":
        hint = f"it looks at this machine; a directory is looked at by: trtkit inspect {quoted(extra[0])}"
    elif arguments:
        hint = f"call it once for each, or see: trtkit {verb} --help"
    else:
        hint = f"see: trtkit {verb} --help"
    return UsageError(message, where=" ".join(map(quoted, extra)), hint=hint)


def _meant(context: Any, words: Sequence[str], given: Sequence[Any]) -> str | None:
    """The words behind the options that they are likely to be for; None where one of them has no place."""
    left, bare, rest = list(words), list[str](), list[str]()
    repeatable = {name for parameter in context.command.params if parameter.multiple for name in parameter.opts}
    taken = {name for parameter in given for name in parameter.opts}
    for option, kinds in _PLACES.get(context.info_name, ()):
        for word in [word for word in left if _kind(word) in kinds]:
            if option in taken - repeatable:
                continue
            taken.add(option)
            left.remove(word)
            if option == _BARE:
                bare.append(quoted(word))
            else:
                rest.append(f"{option} {quoted(word)}")
    return None if left else " ".join([*bare, *rest])


def _kind(word: str) -> str:
    if os.path.isdir(word):  # unlike Path's it takes any text
        return "directory"
    if Path(word).suffix.lower() in (".jsonl", ".csv", ".parquet"):
        return "rows"
    if word.isdigit():
        return "number"
    if word in FORMATS:
        return "format"
    if word in SCHEMES:
        return "precision"
    try:
        profile_named(word)
    except UsageError:
        return "name"
    return "gpu"


def _was_given(context: Any, parameter: Any) -> bool:
    source = context.get_parameter_source(parameter.name)
    return parameter.param_type_name == "option" and source is not None and source.name == "COMMANDLINE"


def _shown(argument: Any) -> str:
    return str(argument.metavar or argument.name).upper()
