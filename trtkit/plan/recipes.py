"""Lines of the plan as build recipes, and the catalogue in ``engines/recipes``: one TOML file per line that fits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from drafter.config import TreeShape
from trtkit.errors import UnsupportedError
from trtkit.files import write_text
from trtkit.gpu import GpuProfile, profile_named
from trtkit.known_models import KNOWN_MODELS
from trtkit.plan.memory import DraftPlan, Workload, default_draft
from trtkit.plan.rows import PlanRow, plan_rows, planned_backend
from trtkit.recipe import Limits, Recipe, write_recipe
from trtkit.scheme import Precision

__all__ = ["CATALOGUE_GPUS", "CATALOGUE_PRECISIONS", "CatalogueLine", "catalogue", "recipe_of", "write_catalogue"]

CATALOGUE_GPUS = ("l4", "l4x4", "h100", "h100x2")
CATALOGUE_PRECISIONS: tuple[Precision, ...] = ("int8", "fp8", "int4")
CATALOGUE_WORK = Workload(batch=12, length=16384)
"""The published batch, and room for the answers of a Fast-Math model."""
_PROMPT_TOKENS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueLine:
    """One combination of the catalogue; without a recipe where it does not fit."""

    model: str
    gpu: str
    row: PlanRow
    recipe: Recipe | None

    @property
    def file_name(self) -> str:
        """``l4x4-fast-math-r1-14b-fp8-drafter-1x3.toml``."""
        stem = f"{self.gpu}-{self.model.rpartition('/')[2].lower()}-{self.row.precision}"
        return f"{stem}-drafter-{self.row.drafter}.toml" if self.row.drafter else f"{stem}.toml"


def recipe_of(model: str, gpu: GpuProfile, work: Workload, row: PlanRow, draft: DraftPlan) -> Recipe:
    """The recipe that builds one line of :func:`~trtkit.plan.rows.plan_rows`: split over all devices, as many rows as
    fit at full length but not more than asked.

    Raises :class:`UnsupportedError` with the plan's reason when the line does not fit.
    """
    if not row.fits:
        name = f"{row.precision} with drafter {row.drafter}" if row.drafter else row.precision
        raise UnsupportedError(
            f"{name} does not fit {gpu.title}: {row.reason}",
            hint="`trtkit plan` lists what does, without --write-recipe",
        )
    tree: TreeShape | None = draft.tree if row.drafter else None
    return Recipe(
        model=model,
        precision=row.precision,
        gpu=gpu.name,
        kv_dtype=work.kv_dtype,
        backend=planned_backend(gpu),
        output_layer=row.output_layer,
        tensor_parallel=gpu.count,
        limits=Limits(
            batch=min(work.batch, row.max_rows),
            prompt_tokens=min(_PROMPT_TOKENS, work.length),
            total_tokens=work.length,
        ),
        tree=tree,
    )


def catalogue() -> tuple[CatalogueLine, ...]:
    """Every known model x ``CATALOGUE_GPUS`` x ``CATALOGUE_PRECISIONS``, with and without the published draft head."""
    lines = []
    for hub_id, spec in KNOWN_MODELS.values():
        draft = default_draft(spec)
        for name in CATALOGUE_GPUS:
            gpu = profile_named(name)
            for row in plan_rows(spec, gpu, CATALOGUE_WORK, draft):
                if row.precision not in CATALOGUE_PRECISIONS:
                    continue
                recipe = recipe_of(hub_id, gpu, CATALOGUE_WORK, row, draft) if row.fits else None
                lines.append(CatalogueLine(model=hub_id, gpu=name, row=row, recipe=recipe))
    return tuple(lines)


def write_catalogue(directory: Path) -> tuple[CatalogueLine, ...]:
    """Write the catalogue's recipes and its README into ``directory``. Files of other names are left alone."""
    lines = catalogue()
    for line in lines:
        if line.recipe is not None:
            write_recipe(directory / line.file_name, line.recipe)
    write_text(directory / "README.md", _readme(lines))
    return lines


def _readme(lines: tuple[CatalogueLine, ...]) -> str:
    fitting = [line for line in lines if line.row.fits]
    refused = [line for line in lines if not line.row.fits]
    work = CATALOGUE_WORK
    text = [
        "# Recipes",
        "",
        "What `trtkit plan` answers for a GPU, a model and a precision, as TOML files that `trtkit.recipe.read_recipe`",
        "reads. Written by `trtkit plan --catalogue engines/recipes`, this page too; a test holds them to the planner.",
        "None of these engines was built or measured for this table: rows and tokens per second are the planner's, see",
        '"The planner against published figures" in `docs/benchmarks.md`.',
        "",
        f"All: {work.batch} rows of at most {work.length:,} tokens (fewer where no more fit), 16-bit keys and values,",
        "the published draft head with one beam of three tokens. `rows` is how many of that length fit, `limit` the",
        "speed at the data-sheet bandwidth. H100 figures follow the published 2xH100 runs, which reached a sixth of",
        "the limit (4xL4: about half): read them as the lower end.",
        "",
        "| recipe | rows | tok/s | limit | remark |",
        "|---|---:|---:|---:|---|",
    ]
    text += [_line(line) for line in fitting]
    text += ["", "## What does not fit", ""]
    if refused:
        text += ["| combination | reason |", "|---|---|"]
        text += [f"| {line.file_name.removesuffix('.toml')} | {line.row.reason} |" for line in refused]
    else:
        text.append("Everything fits.")
    return "\n".join(text) + "\n"


def _line(line: CatalogueLine) -> str:
    row = line.row
    speed, limit = row.tokens_per_second or 0, row.ceiling_tokens_per_second or 0
    link = f"[{line.file_name.removesuffix('.toml')}]({line.file_name})"
    return f"| {link} | {row.max_rows} | {speed:,.0f} | {limit:,.0f} | {row.reason} |"
