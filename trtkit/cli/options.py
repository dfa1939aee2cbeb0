"""Options that several verbs share, so that they are spelled and explained the same everywhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias, TypedDict

import typer

from drafter.config import TreeShape
from trtkit.bundled import drafter_named
from trtkit.errors import RequestError, UsageError

if TYPE_CHECKING:
    from trtkit.runtime.endpoint.remote import Remote

__all__ = [
    "ChosenThreads",
    "Device",
    "Drafter",
    "DraftingOptions",
    "Json",
    "LookUp",
    "Model",
    "OutputLayer",
    "ServerModel",
    "ServerSeeds",
    "ServerTokenizer",
    "ServerUrl",
    "TensorParallel",
    "Threads",
    "Tree",
    "drafting_named",
    "given",
    "idle_beside_server",
    "out_of_range_is_usage",
    "refuse_idle",
    "server_named",
    "tree_named",
]

Json: TypeAlias = Annotated[
    bool, typer.Option("--json", help="Print the result as one JSON document, on the last line of stdout.")
]
Model: TypeAlias = Annotated[
    str, typer.Option("--model", help="Hub id, checkpoint directory, or 'practice' (bundled).")
]
Device: TypeAlias = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Threads: TypeAlias = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; default: one per core.")]
ChosenThreads: TypeAlias = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads; default: up to one per core, whatever is fastest.")
]
OutputLayer: TypeAlias = Annotated[
    str | None, typer.Option("--output-layer", help="lm_head in this run: model (16 bit) or int8; default: as built.")
]
TensorParallel: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--tp", min=1, help="GPUs (on a CPU: processes) that share each layer; default: as built, if they are there."
    ),
]
Tree: TypeAlias = Annotated[
    str,
    typer.Option("--tree", help="Where drafts are made: auto (the fastest at each batch), none, or beams x length."),
]
Drafter: TypeAlias = Annotated[
    Path | None, typer.Option("--drafter", help="Draft head in place of the engine's own ('practice': bundled).")
]
LookUp: TypeAlias = Annotated[
    bool,
    typer.Option("--lookup", help="Draft from what the samples have written: without a draft head, or beside one."),
]

ServerUrl: TypeAlias = Annotated[
    str | None,
    typer.Option("--endpoint", help="In place of an engine: a server that speaks OpenAI's API, http://HOST:PORT/v1."),
]
ServerModel: TypeAlias = Annotated[
    str | None, typer.Option("--endpoint-model", help="Which of the server's models; default: the only one.")
]
ServerSeeds: TypeAlias = Annotated[
    bool, typer.Option("--endpoint-seeds/--no-endpoint-seeds", help="Tell the server each sample's seed.")
]
ServerTokenizer: TypeAlias = Annotated[
    str | None,
    typer.Option("--tokenizer", help="Of what the server serves: checkpoint or hub id; default: what it says."),
]
_ENGINE_OPTIONS = ("--tree", "--drafter", "--lookup", "--device", "--tp", "--threads", "--output-layer")


class DraftingOptions(TypedDict):
    """As in :class:`trtkit.runtime.load.OpenOptions`."""

    speculative: bool
    tree: TreeShape | None
    drafter: Path | None
    lookup: bool


def drafting_named(
    context: typer.Context, *, tree: str, drafter: Path | None, lookup: bool
) -> DraftingOptions:  # fmt: skip
    """What a run says about drafts; no tree means the engine's own choice. Raises :class:`UsageError`."""
    refuse_idle(context, [(tree == "none", ("--drafter", "--lookup"), "not with --tree none")])
    return DraftingOptions(
        speculative=tree != "none", tree=None if tree in ("auto", "none") else tree_named(tree),
        drafter=drafter_named(drafter), lookup=lookup,
    )  # fmt: skip


def server_named(url: str, *, model: str | None, seeds: bool, tokenizer: str | None) -> Remote:
    """The server at ``url``. Raises :class:`UsageError` and :class:`EngineError`."""
    from trtkit.runtime.endpoint.remote import connect
    from trtkit.runtime.endpoint.server import endpoint_named

    return connect(endpoint_named(url, model=model, seeds=seeds), tokenizer)


def idle_beside_server(url: str | None, *engine: str) -> list[tuple[bool, Sequence[str], str]]:
    """Rules for :func:`refuse_idle`: what a server decides by itself, and what only a server needs."""
    return [
        (url is not None, (*engine, *_ENGINE_OPTIONS), "not with --endpoint, whose server decides that"),
        (url is None, ("--endpoint-model", "--endpoint-seeds", "--tokenizer"), "only with --endpoint"),
    ]  # fmt: skip


def tree_named(text: str) -> TreeShape:
    """``4x3`` -> four beams of three tokens. Raises :class:`UsageError`."""
    beams, _, length = text.lower().partition("x")
    try:
        return TreeShape(beams=int(beams), length=int(length))
    except ValueError:
        raise UsageError(f"--tree {text!r}: not a draft tree", hint="beams x length, e.g. 1x3 or 4x4") from None


def given(context: typer.Context, names: Sequence[str]) -> list[str]:
    """Those of the options ``names`` that the command line spells out, whatever their value; of a switch that was
    turned off, the ``--no-`` form."""
    found = {}
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE":
            off = parameter.secondary_opts[:1] if context.params.get(parameter.name or "") is False else []
            found.update({name: [*off, name][0] for name in names if name in parameter.opts})
    return [found[name] for name in names if name in found]


def refuse_idle(context: typer.Context, rules: Sequence[tuple[bool, Sequence[str], str]]) -> None:
    """Refuse options that were given and would be ignored.

    Each rule is whether its options are idle, the options, and why: ``only with --tools python``. Raises
    :class:`UsageError` with all of them.
    """
    idle = [f"{name}: {why}" for holds, names, why in rules if holds for name in given(context, names)]
    if idle:
        raise UsageError("options that would be ignored", offenders=idle, hint=f"see: {context.command_path} --help")


@contextlib.contextmanager
def out_of_range_is_usage() -> Iterator[None]:
    """What an engine would refuse as one request, a command line has asked for: :class:`UsageError` instead."""
    try:
        yield
    except RequestError as problem:
        raise UsageError(problem.message, where=problem.where, offenders=problem.offenders, hint=problem.hint) from None
