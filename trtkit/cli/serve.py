"""``trtkit serve``: an engine behind the OpenAI HTTP interface."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trtkit.cli.engines import chosen_engine, stem
from trtkit.cli.options import (
    ChosenThreads,
    Device,
    Drafter,
    Json,
    LookUp,
    OutputLayer,
    ServerModel,
    ServerSeeds,
    ServerTokenizer,
    ServerUrl,
    TensorParallel,
    Tree,
    drafting_named,
    idle_beside_server,
    out_of_range_is_usage,
    refuse_idle,
    server_named,
)
from trtkit.cli.output import facts, finish, quoted

if TYPE_CHECKING:
    from trtkit.runtime.sources import Source
    from trtkit.serve.run import Serving

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


def command(
    context: typer.Context,
    engine: Annotated[
        Path | None, typer.Argument(help="Engine directory; default: the latest in engines/built.")
    ] = None,
    endpoint: ServerUrl = None,
    endpoint_model: ServerModel = None,
    endpoint_seeds: ServerSeeds = True,
    tokenizer: ServerTokenizer = None,
    host: Annotated[str, typer.Option("--host", help="Where to listen; 0.0.0.0 for other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option("--name", help="What clients call the model; default: as its checkpoint.")
    ] = None,
    reasoning: Annotated[
        str,
        typer.Option("--reasoning", help="inline: the thought is part of the content; separate: reasoning_content."),
    ] = "inline",
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, help="Of NAME:maj, per problem.")] = 32,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest sample of NAME:maj.")] = 16384,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0, max=100, help="This and the next: where a request does not say.")
    ] = 1.0,
    top_p: Annotated[float, typer.Option("--top-p", min=0, max=1)] = 0.9,
    top_k: Annotated[int, typer.Option("--top-k", min=0)] = 0,
    min_p: Annotated[float, typer.Option("--min-p", min=0, max=1)] = 0.05,
    queue: Annotated[
        int, typer.Option("--queue", min=1, help="Samples under way or waiting beyond which clients get a 429.")
    ] = 1024,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", envvar="TRTKIT_API_KEY", help="What clients must present; default: nothing."),
    ] = None,
    device: Device = "auto",
    tensor_parallel: TensorParallel = None,
    threads: ChosenThreads = None,
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, help="Rows that run at once; default: the engine's own limit.")
    ] = None,
    tree: Tree = "auto",
    drafter: Drafter = None,
    lookup: LookUp = False,
    output_layer: OutputLayer = None,
    prefix_cache: Annotated[
        bool,
        typer.Option(help="Keep what was computed while there is room, for prompts that begin with the same tokens."),
    ] = True,
    as_json: Json = False,
) -> None:
    """Serve an engine to OpenAI clients.

    /v1/chat/completions and /v1/completions give samples of NAME; as NAME:maj, the answer that many samples of a
    problem vote for. Everybody's samples run in one in-flight batch. It ends on Ctrl-C.
    """
    from trtkit.chat import prompt_names
    from trtkit.errors import MissingDependency, UsageError
    from trtkit.log import logger

    missing = [package for package in _PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise MissingDependency(f"not installed: {', '.join(missing)}", hint="pip install 'trtkit[serve]'")
    if endpoint is not None and engine is not None:
        raise UsageError("an engine directory and --endpoint: one or the other")
    refuse_idle(context, idle_beside_server(endpoint, "--prefix-cache"))
    drafting = drafting_named(context, tree=tree, drafter=drafter, lookup=lookup)

    from trtkit.runtime.api import SamplingParams
    from trtkit.runtime.load import OpenOptions
    from trtkit.runtime.sources import DirectorySource
    from trtkit.serve.run import ServeOptions, run_serve
    from trtkit.solve.options import SolveOptions

    opening = OpenOptions(
        device=device, threads=threads, rows=batch,
        output_layer=output_layer,  # type: ignore[arg-type]  # checked there
        prefix_cache=prefix_cache, tensor_parallel=tensor_parallel, **drafting,
    )  # fmt: skip
    source: Source
    if endpoint is None:
        source = DirectorySource.of(chosen_engine(engine))
    else:
        source = server_named(endpoint, model=endpoint_model, seeds=endpoint_seeds, tokenizer=tokenizer)
    with out_of_range_is_usage():
        sampling = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    # Samples of one prompt are all but the same there, so that only different prompts make votes.
    variants: dict[str, Any] = {"variants": prompt_names(tools=False)} if source.greedy else {}
    options = ServeOptions(
        name=name or stem(source.model), host=host, port=port,
        reasoning=reasoning,  # type: ignore[arg-type]  # checked there
        voting=SolveOptions(samples=samples, max_tokens=max_tokens, sampling=sampling, **variants),
        most_unfinished=queue, key=api_key,
    )  # fmt: skip

    def tell(serving: Serving) -> None:
        shown = {
            "engine": source.told,
            "models": f"{serving.models[0]} samples, {serving.models[1]} answers by the vote of {samples}",
            "limits": f"{serving.rows} samples at once, {serving.total_tokens:,} tokens each with the prompt",
            "address": f"{serving.url}/v1",
        }
        facts("serving; ends on Ctrl-C", shown)
        finish(_example(serving, keyed=options.key is not None), _document(serving, source) if as_json else None)

    stats = run_serve(source, opening, options, on_ready=tell)
    words = f"stopped: {stats.new_tokens:,} tokens generated"
    if stats.row_steps:  # a server's steps are its own
        words += f", {stats.tokens_per_step:.2f} per row and step"
        words += f", {stats.prefill_tokens:,} of {stats.prompt_tokens:,} prompt tokens computed"
    logger.info("%s", words)


def _document(serving: Serving, source: Source) -> dict[str, Any]:
    """The machine form, printed when requests are taken."""
    place = source.place
    return {
        "url": f"{serving.url}/v1", "models": list(serving.models),
        "engine": str(place) if isinstance(place, Path) else place["path"],
        "rows": serving.rows, "total_tokens": serving.total_tokens,
    }  # fmt: skip


def _example(serving: Serving, *, keyed: bool) -> str:
    """A request to paste."""
    body = {"model": serving.models[1], "messages": [{"role": "user", "content": "For which x is 9x+61=556?"}]}
    key = '-H "Authorization: Bearer $TRTKIT_API_KEY" ' if keyed else ""
    kind = "-H 'Content-Type: application/json'"
    return f"curl {serving.url}/v1/chat/completions {key}{kind} -d {quoted(json.dumps(body))}"
