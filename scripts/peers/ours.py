"""Worker: trtkit's torch runtime, stepped through the ``Engine`` protocol; the only worker that imports trtkit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peers.worker import Mark, Opened, Task, run_worker, versions_of

if TYPE_CHECKING:  # loading them is timed
    from trtkit.runtime.api import Engine
    from trtkit.runtime.load import OpenOptions

VARIANTS = ("bf16", "int8", "int8-sq", "int4")
DRAFTING = "+drafter"
"""Ends the name of a variant that decodes speculatively, with the checkpoint's own draft head."""
FORCED = "+forced"
"""Ends the name of one with a random draft head and a forced acceptance (forced.py): measured only when asked for."""
FORCED_TRIMMED = f"{FORCED}-32k"
"""The same with the trimmed draft vocabulary."""


def forced_endings(vocab: int) -> tuple[str, ...]:
    """What can be measured of those two for a vocabulary of that size: a smaller one is not trimmed."""
    from trtkit.bench.gpu_stages import DRAFT_VOCABULARY

    return (FORCED, FORCED_TRIMMED) if vocab > DRAFT_VOCABULARY else (FORCED,)


def _prepare(task: Task) -> None:
    """int4 is rounded to nearest and int8-sq calibrated on a few rows: neither changes the speed."""
    from drafter.config import TreeShape
    from trtkit.build.native import build_native
    from trtkit.recipe import DRAFTER_DIR, ENGINE_FILE, Limits, Recipe

    out = _directory(task)
    if FORCED in task.variant:
        from peers.forced import make_head

        make_head(Path(task.model), _random_head(task))
    if (out / ENGINE_FILE).is_file():
        return
    drafter = Path(task.model) / DRAFTER_DIR
    drafter_or_none = drafter if drafter.is_dir() else None
    recipe = Recipe(
        model=task.model, precision=_precision(task), int4_method="rtn", calibration_rows=8, calibration_tokens=64,
        limits=Limits(batch=64, prompt_tokens=1024, total_tokens=2048),
        tree=TreeShape(beams=1, length=3) if drafter_or_none else None,
    )  # fmt: skip
    build_native(recipe, out, drafter=drafter_or_none, force=True, device="cpu")


def _precision(task: Task) -> str:
    return task.variant.partition("+")[0]


def _directory(task: Task) -> Path:
    return Path(task.prepared).parent / _precision(task)


def _random_head(task: Task) -> Path:
    return Path(task.prepared).parent / "random-drafter"


class _Model:
    def __init__(self, task: Task) -> None:
        from trtkit.model_spec import read_model_spec
        from trtkit.plan import step_bytes
        from trtkit.recipe import output_layer_of, read_manifest
        from trtkit.runtime.load import OpenOptions, open_engine
        from trtkit.scheme import scheme_named

        options = OpenOptions(device="cpu", threads=task.threads, rows=max(task.batches), speculative=False)
        spec = read_model_spec(_directory(task))
        head = output_layer_of(read_manifest(_directory(task)).recipe)
        self.weight_bytes = round(
            step_bytes(spec, scheme_named(_precision(task)), rows=0, context=0, output_layer=head)
        )
        self._requests = 0
        if FORCED in task.variant:
            self._engine = self._forced(task, options, spec.vocab)
        else:
            options = dataclasses.replace(options, speculative=task.variant.endswith(DRAFTING))
            self._engine = open_engine(_directory(task), options)

    def _forced(self, task: Task, options: OpenOptions, vocab: int) -> Engine:
        from peers import forced
        from trtkit.runtime.load import open_engine
        from trtkit.runtime.torch_engine import TorchEngine

        place, how = _random_head(task), forced.head_options(trimmed=task.variant.endswith(FORCED_TRIMMED))
        options = dataclasses.replace(options, speculative=True, drafter=place, tree=forced.TREE, head=how)
        engine = open_engine(_directory(task), options)
        assert isinstance(engine, TorchEngine)
        forced.force_acceptance(engine, vocab, seed=task.seed)
        self.weight_bytes += round(forced.head_bytes(place, how))
        return engine

    def generate(self, prompt: Sequence[int], batch: int, new_tokens: int, seed: int, mark: Mark) -> list[list[int]]:
        from trtkit.runtime.api import Request, SamplingParams

        rows: dict[str, list[int]] = {}
        for row in range(batch):
            self._requests += 1
            rows[str(self._requests)] = []
            self._engine.submit(
                Request(
                    id=str(self._requests), prompt=tuple(prompt), sampling=SamplingParams(temperature=1.0),
                    max_tokens=new_tokens, seed=seed + row,
                )
            )  # fmt: skip
        while self._engine.has_work:
            whole = all(len(tokens) < new_tokens for tokens in rows.values())
            for output in self._engine.step():
                rows[output.request_id] += output.tokens
            # Drafting rows do not end together. Only steps of the whole batch count.
            if whole:
                mark(sum(map(len, rows.values())))
        return list(rows.values())


def _load(task: Task) -> tuple[dict[str, str], Any]:
    import trtkit.runtime.load  # noqa: F401

    return versions_of("trtkit", "torch"), lambda: _opened(task)


def _opened(task: Task) -> Opened:
    return _Model(task)


if __name__ == "__main__":
    raise SystemExit(run_worker(_prepare, _load))
