"""``trtkit inspect``: what is this directory?"""

from __future__ import annotations

from typing import Annotated

import typer

from trtkit.cli.engines import calibration_words
from trtkit.cli.options import Json
from trtkit.cli.output import facts, finish, quoted
from trtkit.cli.train_drafter import same_command
from trtkit.errors import CheckpointError

_NEXT = {
    "engine": "trtkit solve problems.jsonl --engine {path}",
    "checkpoint": "trtkit build --precision fp8 --model {path}{calibration}",
    "TensorRT-LLM checkpoint": "on the GPU host: trtllm-build --checkpoint_dir {path} --output_dir ENGINE",
    "bundle for trtkit compile": "on the GPU host: trtkit compile {path}",
    "quantized checkpoint (unified HF layout)": "on the GPU host: trtllm-serve {path}",
    "quantized checkpoint (for other servers)": "on the GPU host: vllm serve {path}",
    "ReDrafter head": "trtkit build --drafter {path} --model MODEL",
    "difficulty regressor": "trtkit solve problems.jsonl --time-limit 5h --difficulty {path}",
    "run of trtkit solve": "trtkit report {path}",
}


def command(
    directory: Annotated[str, typer.Argument(help="Checkpoint, engine, head or run directory, or 'practice'.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read everything: digests, tensors, finite values.")] = False,
    as_json: Json = False,
) -> None:
    """Say what a directory is and what it holds.

    With --verify also whether it is whole.
    """
    from trtkit.describe import describe, model_dir

    path = model_dir(directory)
    found = describe(path, verify=verify)
    facts(f"{path}: {found.kind}", found.facts)
    document = {
        "path": found.path, "kind": found.kind, "verified": found.verified, "offenders": list(found.offenders),
        **found.data,
    }  # fmt: skip
    if "training" in found.data:
        advice = same_command(found.data["training"]["plan"], directory)
    else:
        advice = _NEXT.get(found.kind, "trtkit --help").format(
            path=quoted(directory), calibration=calibration_words(directory)
        )
    if found.data.get("difficulty", {}).get("usable") is False:
        advice = "solve more problems with --full-vote and train on all those runs: `trtkit solve` refuses this one"
    if found.offenders:
        advice = "get the damaged files again, or build again with --force"
    finish(advice, document if as_json else None)
    if found.offenders:
        raise CheckpointError(f"{len(found.offenders)} thing(s) wrong", where=str(path), offenders=found.offenders[:20])
