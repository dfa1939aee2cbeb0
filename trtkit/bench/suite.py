"""The whole table of one model on this machine: precision x draft head x batch, as JSON and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trtkit.bench.engines import BenchOptions, BenchResult, Point, check_sources, measure
from trtkit.build.native import build_native
from trtkit.errors import MissingDependency
from trtkit.files import write_json
from trtkit.log import logger
from trtkit.recipe import ENGINE_FILE, Limits, Recipe, read_manifest, settled
from trtkit.scheme import SCHEMES

__all__ = ["measure_suite", "plot"]

_LIMITS = Limits(batch=64, prompt_tokens=2048, total_tokens=4096)


def measure_suite(
    model: str, out: Path, options: BenchOptions, *, precisions: Sequence[str] = tuple(SCHEMES)
) -> BenchResult:
    """Build what is missing in ``out/engines``, measure everything, write ``suite.json`` and ``suite.png``.

    ``options.drafter`` is measured with every precision. int4 is rounded to nearest: its speed does not depend on the
    search for its scales.
    """
    check_sources((), options)
    engines = [_engine(model, precision, out / "engines" / precision) for precision in precisions]
    result = measure(engines, options)
    write_json(out / "suite.json", {"model": model, **result.document()})
    try:
        plot(result.points, out / "suite.png", f"{model} on {result.machine.device}, {result.machine.threads} threads")
    except MissingDependency as missing:
        logger.info("no suite.png: %s", missing.message)
    return result


def _engine(model: str, precision: str, directory: Path) -> Path:
    recipe = settled(Recipe(model=model, precision=precision, int4_method="rtn", limits=_LIMITS))
    if (directory / ENGINE_FILE).is_file():
        if read_manifest(directory).recipe == recipe:
            return directory
        logger.info("%s was built otherwise; building it again", directory)
    build_native(recipe, directory, force=True)
    return directory


def plot(points: Sequence[Point], path: Path, title: str) -> None:
    """Tokens per second over the batch, a line per engine, dashed with a draft head.

    Raises :class:`MissingDependency` without matplotlib.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise MissingDependency("matplotlib is not installed", hint="pip install 'trtkit[report]'") from None
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    colours: dict[str, Any] = {}
    for precision, drafter in dict.fromkeys((point.precision, point.drafter) for point in points):
        line = [point for point in points if (point.precision, point.drafter) == (precision, drafter)]
        (drawn,) = axes.plot(
            [point.batch for point in line], [point.tokens_per_second for point in line],
            marker="o", linestyle="--" if drafter else "-", color=colours.get(precision),
            label=f"{precision} + drafter ({drafter})" if drafter else precision,
        )  # fmt: skip
        colours[precision] = drawn.get_color()
    batches = sorted({point.batch for point in points})
    axes.set(xlabel="batch (rows)", ylabel="tokens per second, all rows", title=title, ylim=(0, None))
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
