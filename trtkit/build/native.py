"""Build a native engine: a quantized checkpoint in the unified layout with its ``engine.json``."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
from pathlib import Path

import torch

import trtkit
from trtkit.build.calibration import CALIBRATION_FILE, CalibrationText, read_calibration
from trtkit.build.draft_head import add_head, check_head, head_bytes
from trtkit.chat import load_chat
from trtkit.checkpoint.convert import check_alignment, convert
from trtkit.checkpoint.hf import EMBEDDING, HfCheckpoint, check_finite, open_source, resolve_source
from trtkit.checkpoint.quality import measure_quality
from trtkit.checkpoint.rank_share import check_shares
from trtkit.checkpoint.shard_writer import check_space, layout_bytes
from trtkit.checkpoint.unified import open_unified, unified_layout
from trtkit.errors import CheckpointError, InputError, OutputError, QualityError, UsageError
from trtkit.log import logger
from trtkit.quant.calibrate import CalibrationOptions, Calibrator, DataFree, LayerwiseCalibrator
from trtkit.quant.modelopt import ModeloptCalibrator, require_modelopt
from trtkit.recipe import ENGINE_FILE, EngineManifest, Quality, Recipe, output_layer_of, settled, write_manifest
from trtkit.scheme import QuantScheme, scheme_named
from trtkit.staging import staged_dir

__all__ = ["build_native", "check_target", "pre_scaled"]


def build_native(
    recipe: Recipe,
    out: Path,
    *,
    calibration: Path | None = None,
    drafter: Path | None = None,
    max_kl: float | None = None,
    force: bool = False,
    device: str = "auto",
) -> EngineManifest:
    """Build ``recipe`` into the directory ``out``, which appears whole or not at all.

    ``calibration`` is a JSONL of problems and solutions; without it ``calibration.jsonl`` beside the weights is taken
    where there is one. Formats that need no data build without; their quality is then not measured. Calibration and the
    quality report run on ``device`` (auto: CUDA where there is one). ``drafter`` is a trained draft head to go with the
    engine; ``recipe.tree`` says what it draws.

    Raises :class:`QualityError` when the mean KL exceeds ``max_kl`` (nothing is kept), and for bad input
    :class:`InputError`, :class:`ConfigError`, :class:`CheckpointError`, :class:`UnsupportedError`, :class:`HubError`,
    :class:`OutputError`, :class:`MissingDependency`, all before the first weight is converted but a filled disk,
    and NaN or Inf among the weights where nothing is calibrated: the conversion itself looks for them as it reads.
    """
    recipe = settled(recipe)
    scheme = dataclasses.replace(scheme_named(recipe.precision), kv_dtype=recipe.kv_dtype)
    layer = output_layer_of(recipe)
    if max_kl is not None and not max_kl > 0:
        raise UsageError(f"--max-kl {max_kl}: must be a positive number")
    directory = resolve_source(recipe.model)
    check_target(out, directory, force)
    before = _state(directory)
    source = open_source(directory)
    check_alignment(source.spec, scheme)
    check_shares(source.spec, scheme, recipe.tensor_parallel)
    if drafter is not None:
        check_head(drafter, source.spec, load_chat(source.directory))
    calibrated = _needs_data(recipe, scheme)
    text = _text(recipe, source, calibration, needed=calibrated, judged=max_kl is not None)
    modelopt = calibrated and recipe.calibrator == "modelopt"
    if modelopt:
        require_modelopt()
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    pre_scale = pre_scaled(recipe, scheme)
    with staged_dir(out, replace=force) as stage:
        check_space(
            stage, layout_bytes(unified_layout(source.spec, scheme, pre_scale=pre_scale)) + head_bytes(drafter)
        )  # fmt: skip
        if calibrated:
            # The conversion looks too, but only after minutes of calibration.
            check_finite(source)
        calibrator = _calibrator(recipe, scheme, source, text if calibrated else None, place)
        digests = convert(source, stage, scheme, calibrator, pre_scale=pre_scale)
        del calibrator
        if drafter is not None:
            digests |= add_head(drafter, stage)
        quality = None
        if text is not None and (scheme.weight_format, scheme.kv_dtype, layer) != ("bf16", "model", "model"):
            quality = measure_quality(source, open_unified(stage), text.held_out, device=place, output_layer=layer)
            _log_quality(quality)
            _gate(quality, max_kl)
        elif text is None:
            logger.info("quality: not measured (no text; pass --calibration FILE.jsonl to compare with the original)")
        manifest = EngineManifest(
            recipe=recipe,
            backend="torch",
            versions=_versions(modelopt),
            checkpoint_digest=digests,
            quality=quality,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        )
        write_manifest(stage, manifest)
        changed = [name for name, state in _state(directory).items() if before.get(name) != state]
        if changed:
            raise CheckpointError(
                "the checkpoint changed while it was read; nothing was kept",
                where=str(directory),
                offenders=changed,
                hint="wait until it is whole (a download may still be running), then build again",
            )
    return manifest


def _state(directory: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file that a build reads: enough to notice that one was replaced."""
    found = {}
    for path in sorted(directory.iterdir()):
        # A link to nowhere, as a pruned download leaves it: whoever needs the file says so, in better words.
        if path.suffix in (".safetensors", ".json") and path.exists():
            facts = path.stat()
            found[path.name] = (facts.st_size, facts.st_mtime_ns)
    return found


def check_target(out: Path, source: Path, force: bool, mark: str = ENGINE_FILE) -> None:
    """``--force`` replaces engines (directories with the file ``mark``), never others, and never the source."""
    target, origin = out.resolve(), source.resolve()
    if target == origin or target in origin.parents:
        raise UsageError("the output would replace the checkpoint it is built from", where=str(out))
    if force and out.is_dir() and any(out.iterdir()) and not (out / mark).is_file():
        raise OutputError(
            f"is not what --force may replace (no {mark})",
            where=str(out),
            hint="choose another --out",
        )


def pre_scaled(recipe: Recipe, scheme: QuantScheme) -> bool:
    """Whether the linears scale their inputs."""
    return scheme.name == "int8-sq" or (scheme.name == "int4" and recipe.int4_method == "awq")


def _needs_data(recipe: Recipe, scheme: QuantScheme) -> bool:
    if scheme.name == "int4" and recipe.int4_method == "rtn":
        return scheme.kv_dtype == "int8"
    return scheme.calibrated or scheme.kv_dtype == "int8"


def _text(
    recipe: Recipe, source: HfCheckpoint, calibration: Path | None, *, needed: bool, judged: bool
) -> CalibrationText | None:
    path = calibration or source.directory / CALIBRATION_FILE
    if calibration is None and not path.is_file():
        if needed or judged:
            why = (
                f"--precision {recipe.precision} needs calibration text"
                if needed
                else "--max-kl needs text to judge by"
            )
            raise InputError(
                why,
                where=recipe.model,
                hint='pass --calibration FILE.jsonl with rows of "problem" and "generated_solution", the columns of '
                "OpenMathReasoning; int8, bf16 and int4 with --int4-method rtn need none",
            )
        return None
    return read_calibration(
        path,
        load_chat(source.directory),
        rows=recipe.calibration_rows,
        tokens=min(recipe.calibration_tokens, source.spec.max_positions),
        vocab=source.spec.vocab,
    )


def _calibrator(
    recipe: Recipe,
    scheme: QuantScheme,
    source: HfCheckpoint,
    text: CalibrationText | None,
    device: torch.device,
) -> Calibrator:
    if text is None:
        return DataFree()
    options = CalibrationOptions(smooth_alpha=recipe.smooth_alpha, int4_awq=recipe.int4_method == "awq")
    if recipe.calibrator == "modelopt":
        return ModeloptCalibrator(source.directory, scheme, text.calibration, options=options, device=device)
    return LayerwiseCalibrator(
        source.spec,
        scheme,
        text.calibration,
        source.shards.tensor(EMBEDDING),
        options=options,
        device=device,
    )


def _log_quality(quality: Quality) -> None:
    logger.info(
        "quality on %s held-out tokens: mean KL %.3g, top-1 agreement %.2f %%, perplexity %.4f (bf16 %.4f)",
        f"{quality.tokens:,}", quality.kl_mean, 100 * quality.top1_agreement, quality.perplexity,
        quality.perplexity_bf16,
    )  # fmt: skip
    worst = ", ".join(f"{name} {error:.4f}" for name, error in quality.worst_tensors[:3])
    logger.info("largest weight errors: %s", worst)


def _gate(quality: Quality, max_kl: float | None) -> None:
    # Written so that a NaN fails too.
    if max_kl is not None and not quality.kl_mean <= max_kl:
        raise QualityError(
            f"mean KL {quality.kl_mean:.3g} on held-out text exceeds --max-kl {max_kl}; nothing was kept",
            offenders=[f"{name}: relative weight error {error:.4f}" for name, error in quality.worst_tensors],
            hint="try int8 or fp8 weights, --int4-method awq, more calibration rows, or a larger --max-kl",
        )


def _versions(modelopt: bool) -> dict[str, str]:
    names = ["torch", "transformers", "safetensors", *(["nvidia-modelopt"] if modelopt else [])]
    return {"trtkit": trtkit.__version__} | {name: importlib.metadata.version(name) for name in names}
