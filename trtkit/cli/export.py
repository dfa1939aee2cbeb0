"""``trtkit export``: a built engine's weights in the formats of TensorRT-LLM and of other servers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from trtkit.bundled import drafter_named
from trtkit.checkpoint.trtllm_config import TrtllmOptions
from trtkit.cli.options import Json, tree_named
from trtkit.cli.output import facts, finish, gigabytes, notice, quoted
from trtkit.errors import ConfigError, OutputError, UsageError
from trtkit.files import nearest, read_json
from trtkit.recipe import BUNDLE_FILE, COMPILED_DIR, DRAFTER_DIR, ENGINE_FILE, output_layer_of, read_manifest

FORMATS = ("unified-hf", "trtllm", "compressed-tensors")
_DTYPES = ("bfloat16", "float16")


def command(
    directory: Annotated[Path, typer.Argument(help="Engine directory, or a checkpoint in the same layout.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Where to write (required); it appears whole or not at all.")
    ] = None,
    format_name: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="trtllm (rank files for TensorRT-LLM 1.0 to 1.2), unified-hf (its PyTorch backend), or "
            "compressed-tensors (vLLM); required.",
        ),
    ] = None,
    tensor_parallel: Annotated[int, typer.Option("--tp", min=1, help="trtllm: GPUs that share each layer.")] = 1,
    pipeline_parallel: Annotated[int, typer.Option("--pp", min=1, help="trtllm: groups of layers in a row.")] = 1,
    drafter: Annotated[
        str, typer.Option("--drafter", help="trtllm: auto (the engine's own head), none, practice, or a directory.")
    ] = "auto",
    tree: Annotated[
        str | None, typer.Option("--tree", help="trtllm: draft tree, beams x length; default: the engine's.")
    ] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="trtllm: ReDrafter for temperature 0 only.")] = False,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="trtllm: bfloat16 or float16; default: the checkpoint's.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Write an engine's weights for TensorRT-LLM or another server.

    The same codes and scales, in its layout.
    """
    # Not typer's own "required", which speaks before a word too many can be told its place.
    if out is None or format_name is None:
        missing = [name for name, value in (("--out", out), ("--format", format_name)) if value is None]
        raise UsageError(
            f"{' and '.join(missing)}: missing", where=f"trtkit export {quoted(directory)}",
            hint=f"trtkit export {quoted(directory)} --format {'|'.join(FORMATS)} --out DIR",
        )  # fmt: skip
    if format_name not in FORMATS:
        raise UsageError(
            f"unknown --format {format_name!r}{nearest(format_name, FORMATS)}", hint=f"one of: {', '.join(FORMATS)}"
        )
    if (directory / BUNDLE_FILE).is_file() or (directory / "rank0.safetensors").is_file():
        raise UsageError(
            "is in TensorRT-LLM's layout already", where=str(directory), hint="export the engine that it was made from"
        )
    if (directory / COMPILED_DIR).is_dir():
        raise UsageError(
            "is compiled: it holds no weights that another format could have", where=str(directory),
            hint="build the model with --backend torch, and export that engine",
        )  # fmt: skip
    _check_target(out, force=force)
    if format_name == "trtllm":
        document = _trtllm(directory, out, _options(directory, drafter, tree, dtype, tensor_parallel, pipeline_parallel,
                                                    greedy=greedy), force=force)  # fmt: skip
        advice = f"on the GPU host: trtllm-build --checkpoint_dir {quoted(out)} --output_dir ENGINE"
    else:
        given = {"--tp": tensor_parallel > 1, "--pp": pipeline_parallel > 1, "--greedy": greedy,
                 "--drafter": drafter not in ("auto", "none"), "--tree": tree, "--dtype": dtype}  # fmt: skip
        if any(given.values()):
            raise UsageError(
                "options of --format trtllm only",
                offenders=[name for name, was in given.items() if was],
                hint="the others split the weights when they load them, and have no ReDrafter",
            )
        if format_name == "unified-hf":
            document = _unified(directory, out, force=force)
            advice = f"on the GPU host: trtllm-serve {quoted(out)}"
        else:
            document = _compressed(directory, out, force=force)
            advice = f"on the GPU host: vllm serve {quoted(out)}"
    finish(advice, document if as_json else None)


def _options(
    directory: Path, drafter: str, tree: str | None, dtype: str | None, tensor: int, pipeline: int, *, greedy: bool
) -> TrtllmOptions:
    if dtype is not None and dtype not in _DTYPES:
        raise UsageError(f"--dtype {dtype!r}{nearest(dtype, _DTYPES)}", hint=f"one of: {', '.join(_DTYPES)}")
    head = None
    if drafter == "auto":
        head = directory / DRAFTER_DIR if (directory / DRAFTER_DIR).is_dir() else None
    elif drafter != "none":
        head = drafter_named(Path(drafter))
    shape = None
    if head is not None and tree is not None:
        shape = tree_named(tree)
    elif head is not None:
        shape = read_manifest(directory).recipe.tree if (directory / ENGINE_FILE).is_file() else None
        if shape is None:
            raise UsageError("a ReDrafter engine has its draft tree built in", hint="pass --tree, e.g. --tree 1x3")
    elif tree is not None or greedy:
        raise UsageError("--tree and --greedy need a draft head", hint="pass --drafter DIR")
    return TrtllmOptions(
        tensor_parallel=tensor, pipeline_parallel=pipeline, drafter=head, tree=shape, greedy=greedy,
        dtype=dtype,  # type: ignore[arg-type]  # checked against _DTYPES
    )  # fmt: skip


def _trtllm(directory: Path, out: Path, options: TrtllmOptions, *, force: bool) -> dict[str, Any]:
    from trtkit.checkpoint.trtllm import trtllm_notes, write_trtllm_checkpoint
    from trtkit.checkpoint.trtllm_parse import read_trtllm_config
    from trtkit.checkpoint.unified import open_unified

    output_note = _output_note(directory)
    digests = write_trtllm_checkpoint(directory, out, options, replace=force)
    written, source = read_trtllm_config(out), open_unified(directory)
    notes = [*trtllm_notes(source.spec, source.scheme, options), *output_note]
    tree = f"ReDrafter {written.tree}{', greedy' if written.greedy else ''}" if written.head else "none"
    facts(
        "TensorRT-LLM checkpoint",
        {
            "directory": str(out),
            "precision": written.scheme.told,
            "ranks": f"{options.world_size}, {_size(out)} in all",
            "drafter": tree,
        },
    )
    for note in notes:
        notice(f"note: {note}")
    return {
        "directory": str(out), "format": "trtllm", "precision": written.scheme.name, "ranks": options.world_size,
        "tensor_parallel": options.tensor_parallel, "pipeline_parallel": options.pipeline_parallel,
        "tree": str(written.tree) if written.tree else None, "notes": notes, "digests": digests,
    }  # fmt: skip


def _unified(directory: Path, out: Path, *, force: bool) -> dict[str, Any]:
    from trtkit.checkpoint.unified import open_unified
    from trtkit.checkpoint.unified_export import SPECULATIVE_MODES, unified_notes, write_unified_hf

    notes = _output_note(directory)
    digests = write_unified_hf(directory, out, replace=force)
    notes += unified_notes(open_unified(directory).scheme)
    scheme = open_unified(out).scheme
    modes = ", ".join(SPECULATIVE_MODES)
    facts(
        "unified HF checkpoint",
        {
            "directory": str(out),
            "precision": scheme.told,
            "size": _size(out),
            "speculative": f"{modes}; no ReDrafter",
        },
    )
    if (directory / DRAFTER_DIR).is_dir():
        notes.append("the engine's ReDrafter head stays behind, that backend cannot load it")
    for note in notes:
        notice(f"note: {note}")
    return {
        "directory": str(out), "format": "unified-hf", "precision": scheme.name,
        "speculative_modes": list(SPECULATIVE_MODES), "notes": notes, "digests": digests,
    }  # fmt: skip


def _compressed(directory: Path, out: Path, *, force: bool) -> dict[str, Any]:
    from trtkit.checkpoint.compressed_export import compressed_notes, write_compressed
    from trtkit.checkpoint.unified import open_unified

    digests = write_compressed(directory, out, replace=force)
    source = open_unified(directory)
    notes = [*_output_note(directory), *compressed_notes(source)]
    if (directory / DRAFTER_DIR).is_dir():
        notes.append("the engine's ReDrafter head stays behind: no server of this format runs one")
    facts(
        "compressed-tensors checkpoint",
        {"directory": str(out), "precision": source.scheme.name, "size": _size(out)},
    )
    for note in notes:
        notice(f"note: {note}")
    return {
        "directory": str(out), "format": "compressed-tensors", "precision": source.scheme.name, "notes": notes,
        "digests": digests,
    }  # fmt: skip


def _output_note(directory: Path) -> list[str]:
    if not (directory / ENGINE_FILE).is_file() or output_layer_of(read_manifest(directory).recipe) == "model":
        return []
    return ["lm_head is written in the model's dtype, as servers keep it; this engine runs it in int8"]


def _size(directory: Path) -> str:
    return gigabytes(sum(path.stat().st_size for path in directory.glob("*.safetensors")))


def _check_target(out: Path, *, force: bool) -> None:
    """``--force`` replaces exports, never other directories: an engine, a checkpoint, a draft head."""
    if not force or not out.is_dir() or not any(out.iterdir()) or _is_export(out):
        return
    raise OutputError(
        "is not an export, and --force replaces nothing else",
        where=str(out),
        hint="choose another --out, or remove the directory yourself"
        + ("" if (out / ENGINE_FILE).is_file() else "; an export in bf16 looks like any checkpoint"),
    )


def _is_export(out: Path) -> bool:
    from trtkit.checkpoint.compressed_export import EXPORTED_BY
    from trtkit.checkpoint.unified import QUANT_FILE

    if (out / ENGINE_FILE).is_file():
        return False
    if all(path.name == "config.json" or re.fullmatch(r"rank\d+\.safetensors", path.name) for path in out.iterdir()):
        return (out / "rank0.safetensors").is_file()
    try:
        if EXPORTED_BY in read_json(out / "config.json"):
            return True
        return bool(read_json(out / QUANT_FILE)["producer"]["name"] == "trtkit")
    except (ConfigError, KeyError, TypeError):
        return False
