"""From a recipe to a TensorRT-LLM engine directory, in one go or in two.

The first half runs on any machine: quantize with the native path, write the TensorRT-LLM checkpoint, and keep it with
everything else that the GPU host needs. That is a *bundle*:

    bundle.json      what was prepared: recipe, versions, quality, digests
    recipe.toml      the same recipe, to read or to build from again
    README.txt       the commands of the second half
    checkpoint/      config.json and rank{N}.safetensors for TensorRT-LLM
    ...              tokenizer files and the model's own config.json

The second half needs ``tensorrt_llm`` and the GPU that the recipe names. It leaves an engine directory:

    engine.json      the manifest, with versions, flags and digests
    compiled/        what TensorRT-LLM wrote: config.json and rank{N}.engine
    ...              tokenizer files and the model's own config.json
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trtkit.build.draft_head import head_bytes
from trtkit.build.native import build_native, check_target, pre_scaled
from trtkit.build.trtllm import (
    ENGINE_SHARE,
    Compilation,
    check_device,
    check_space,
    compile_engine,
    require_tensorrt_llm,
)
from trtkit.build.trtllm_config import (
    WINDOW_TEXT,
    BuildPlan,
    build_flags,
    check_gpu,
    command_line,
    container_line,
    plan_build,
)
from trtkit.checkpoint.hf import open_source, resolve_source
from trtkit.checkpoint.shard_writer import check_space as check_room
from trtkit.checkpoint.shard_writer import layout_bytes
from trtkit.checkpoint.shards import raise_damaged
from trtkit.checkpoint.trtllm import TrtllmOptions, check_trtllm, write_trtllm_checkpoint
from trtkit.checkpoint.trtllm_check import head_config, trtllm_notes
from trtkit.checkpoint.trtllm_layout import rank_layout
from trtkit.checkpoint.unified import unified_layout
from trtkit.errors import EngineError
from trtkit.files import digest_file, write_text
from trtkit.log import logger
from trtkit.model_spec import ModelSpec, read_model_spec
from trtkit.recipe import (
    BUNDLE_FILE,
    COMPILED_DIR,
    DRAFTER_DIR,
    ENGINE_FILE,
    EngineManifest,
    Recipe,
    read_manifest,
    settled,
    write_manifest,
    write_recipe,
)
from trtkit.scheme import QuantScheme, scheme_named
from trtkit.staging import staged_dir

__all__ = [
    "CHECKPOINT_DIR",
    "Sources",
    "build_trtllm",
    "compile_bundle",
    "equivalent_command",
    "prepare_bundle",
]

CHECKPOINT_DIR = "checkpoint"
RECIPE_FILE = "recipe.toml"
README_FILE = "README.txt"
_NATIVE = "native"
_OWN = (BUNDLE_FILE, RECIPE_FILE, README_FILE, ENGINE_FILE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """What a build reads beside the recipe; see ``build_native``."""

    calibration: Path | None = None
    drafter: Path | None = None
    max_kl: float | None = None
    device: str = "auto"


def prepare_bundle(recipe: Recipe, out: Path, sources: Sources, *, force: bool = False) -> EngineManifest:
    """Quantize and write a bundle into ``out``, which appears whole or not at all. Needs no GPU.

    Raises what :func:`build_native` and the checkpoint writer raise; what TensorRT-LLM cannot build is refused before
    the first weight is read.
    """
    # Settled for the backend that will run it: the native half below would settle for another.
    recipe = settled(recipe)
    check_target(out, resolve_source(recipe.model), force, BUNDLE_FILE)
    options = _check(recipe, sources)
    for note in _notes(recipe, options):
        logger.warning("note: %s", note)
    with staged_dir(out, replace=force) as stage:
        native_bytes, rank_bytes = _sizes(recipe, options)
        check_room(stage, native_bytes + rank_bytes)
        native = stage / _NATIVE
        manifest = build_native(
            dataclasses.replace(recipe, backend="torch"), native, calibration=sources.calibration,
            drafter=sources.drafter, max_kl=sources.max_kl, device=sources.device,
        )  # fmt: skip
        logger.info("writing the TensorRT-LLM checkpoint, %d rank(s)", recipe.tensor_parallel)
        if sources.drafter is not None:
            options = dataclasses.replace(options, drafter=native / DRAFTER_DIR)
        written = write_trtllm_checkpoint(native, stage / CHECKPOINT_DIR, options)
        digests = {f"{CHECKPOINT_DIR}/{name}": digest for name, digest in written.items()}
        digests |= _copy_companions(resolve_source(recipe.model), native, stage)
        shutil.rmtree(native)
        prepared = dataclasses.replace(manifest, recipe=recipe, backend="tensorrt-llm", checkpoint_digest=digests)
        write_manifest(stage, prepared, BUNDLE_FILE)
        write_recipe(stage / RECIPE_FILE, recipe)
        plan = plan_build(recipe, read_model_spec(stage))
        write_text(stage / README_FILE, _readme(plan, recipe, out.name))
    return prepared


def compile_bundle(bundle: Path, out: Path, *, workers: int | None = None, force: bool = False) -> EngineManifest:
    """Compile a bundle on this machine into the engine directory ``out``, which appears whole or not at all.

    Raises :class:`MissingDependency` and :class:`UnsupportedError` for the wrong package or GPU, :class:`EngineError`
    for what is no bundle or does not build, :class:`CheckpointError` for one that was damaged on its way,
    :class:`OutputError` when the disk is too small.
    """
    prepared = _read_bundle(bundle)
    check_target(out, bundle, force)
    version, capability = require_tensorrt_llm(), check_device(prepared.recipe.gpu)
    _check_digests(bundle, prepared)
    check_space(bundle / CHECKPOINT_DIR, out)
    with staged_dir(out, replace=force) as stage:
        return _finish(bundle, prepared, stage, _Host(version, capability, out.parent), workers)


def build_trtllm(
    recipe: Recipe, out: Path, sources: Sources, *, workers: int | None = None, force: bool = False
) -> EngineManifest:
    """Both halves at once, on the GPU host. Raises what :func:`prepare_bundle` and :func:`compile_bundle` raise."""
    recipe = settled(recipe)
    check_target(out, resolve_source(recipe.model), force)
    native_bytes, rank_bytes = _sizes(recipe, _check(recipe, sources))
    version, capability = require_tensorrt_llm(), check_device(recipe.gpu)
    with staged_dir(out, replace=force) as stage:
        check_room(stage, rank_bytes + max(native_bytes, int(ENGINE_SHARE * rank_bytes)))
        bundle = stage / "bundle"
        prepared = prepare_bundle(recipe, bundle, sources)
        check_space(bundle / CHECKPOINT_DIR, stage)
        manifest = _finish(bundle, prepared, stage, _Host(version, capability, out.parent), workers)
        shutil.rmtree(bundle)
    return manifest


def equivalent_command(recipe: Recipe, sources: Sources, out: Path) -> str:
    """The ``trtllm-build`` line that compiles what this recipe prepares. Raises like :func:`prepare_bundle`."""
    _check(recipe, sources)
    spec, _ = _model(recipe)
    return command_line(plan_build(recipe, spec), checkpoint=f"{out}/{CHECKPOINT_DIR}", out=f"{out}/{COMPILED_DIR}")


def _check(recipe: Recipe, sources: Sources) -> TrtllmOptions:
    check_gpu(recipe)
    options = TrtllmOptions(
        tensor_parallel=recipe.tensor_parallel, drafter=sources.drafter, tree=recipe.tree, greedy=recipe.greedy
    )
    check_trtllm(*_model(recipe), options)
    return options


def _sizes(recipe: Recipe, options: TrtllmOptions) -> tuple[int, int]:
    """Bytes of the native checkpoint and of the rank files, which lie side by side until the latter are whole."""
    spec, scheme = _model(recipe)
    pre_scale = pre_scaled(recipe, scheme)
    native = layout_bytes(unified_layout(spec, scheme, pre_scale=pre_scale)) + head_bytes(options.drafter)
    ranks = rank_layout(spec, scheme, options, head_config(options), stage=0, pre_scale=pre_scale)
    return native, options.tensor_parallel * layout_bytes(ranks)


def _model(recipe: Recipe) -> tuple[ModelSpec, QuantScheme]:
    scheme = dataclasses.replace(scheme_named(recipe.precision), kv_dtype=recipe.kv_dtype)
    return open_source(resolve_source(recipe.model)).spec, scheme


def _notes(recipe: Recipe, options: TrtllmOptions) -> list[str]:
    notes = list(trtllm_notes(*_model(recipe), options))
    if recipe.tree is not None and recipe.kv_dtype != "model":
        notes.append("ReDrafter with an 8-bit KV cache: no run of this combination is known; check the answers")
    return notes


@dataclass(frozen=True, slots=True)
class _Host:
    version: str
    capability: str
    place: Path
    """Where engines are kept, and with them the timing cache that the next build profits from."""

    @property
    def timing_cache(self) -> Path:
        return self.place / f".timing-{self.version}-sm{self.capability.replace('.', '')}.cache"


def _finish(bundle: Path, prepared: EngineManifest, stage: Path, host: _Host, workers: int | None) -> EngineManifest:
    plan = plan_build(prepared.recipe, read_model_spec(bundle))
    job = Compilation(
        checkpoint=bundle / CHECKPOINT_DIR, out=stage / COMPILED_DIR, plan=plan, timing_cache=host.timing_cache
    )
    compile_engine(job, workers=workers)
    digests = {}
    for path in _companions(bundle):
        shutil.copyfile(path, stage / path.name)
        digests[path.name] = prepared.checkpoint_digest[path.name]
    digests |= {f"{COMPILED_DIR}/{path.name}": digest_file(path) for path in sorted(job.out.iterdir())}
    versions = {"tensorrt-llm": host.version, "compute capability": host.capability, **_tensorrt()}
    manifest = dataclasses.replace(
        prepared,
        versions={**prepared.versions, **versions},
        checkpoint_digest=digests,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        flags=build_flags(plan),
    )
    write_manifest(stage, manifest)
    return manifest


def _tensorrt() -> dict[str, str]:
    try:
        return {"tensorrt": importlib.metadata.version("tensorrt")}
    except importlib.metadata.PackageNotFoundError:  # containers carry it without a Python distribution of that name
        return {}


def _copy_companions(source: Path, native: Path, stage: Path) -> dict[str, str]:
    """Tokenizer files, generation config and the model's own config.json; their digests."""
    skipped = (ENGINE_FILE, "hf_quant_config.json", "model.safetensors.index.json", "config.json")
    names = [path.name for path in sorted(native.iterdir())
             if path.is_file() and path.suffix != ".safetensors" and path.name not in skipped]  # fmt: skip
    for name in names:
        shutil.copyfile(native / name, stage / name)
    # The source's, because the native one speaks of quantized weights that are not here.
    shutil.copyfile(source / "config.json", stage / "config.json")
    return {name: digest_file(stage / name) for name in (*names, "config.json")}


def _companions(bundle: Path) -> Iterator[Path]:
    for path in sorted(bundle.iterdir()):
        if path.is_file() and path.name not in _OWN:
            yield path


def _read_bundle(bundle: Path) -> EngineManifest:
    if not (bundle / BUNDLE_FILE).is_file():
        raise EngineError(
            f"not a bundle (no {BUNDLE_FILE})",
            where=str(bundle),
            hint="make one with `trtkit build --backend tensorrt-llm --gpu l4x4 --prepare-only`",
        )
    return read_manifest(bundle, BUNDLE_FILE)


def _check_digests(bundle: Path, prepared: EngineManifest) -> None:
    logger.info("checking the bundle's files")
    problems = [
        f"{name}: {'missing' if not (bundle / name).is_file() else 'its contents have changed since it was prepared'}"
        for name, digest in prepared.checkpoint_digest.items()
        if not (bundle / name).is_file() or digest_file(bundle / name) != digest
    ]
    problems += [
        f"{path.name}: not part of the bundle" for path in _companions(bundle)
        if path.name not in prepared.checkpoint_digest
    ]  # fmt: skip
    raise_damaged(bundle, problems, "the bundle is not what was prepared; copy it again")


def _readme(plan: BuildPlan, recipe: Recipe, name: str) -> str:
    finish = f"trtkit compile {shlex.quote(name)} --out engine"
    line = command_line(plan, checkpoint=f"{name}/{CHECKPOINT_DIR}", out=f"engine/{COMPILED_DIR}")
    return f"""\
A TensorRT-LLM checkpoint, prepared by trtkit for {recipe.gpu} ({recipe.tensor_parallel} rank(s)).

On a host with that GPU, with trtkit and TensorRT-LLM {WINDOW_TEXT}, in the directory that holds this one:

    {finish}

In NVIDIA's public container, with a wheel of trtkit beside this directory (CUDA 13 hosts: take release 1.2.1):

    {container_line(f"pip install trtkit-*.whl && {finish}")}

The engine runs only under the TensorRT-LLM that compiled it and on that kind of GPU; this bundle does not age.
What is compiled is the same as with:

    {line}
"""
