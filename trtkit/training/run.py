"""Train a draft head from a model name and a source of rows to a directory that ``build --drafter`` takes.

out/config.json, model.safetensors    the head under the public names
out/training.json                     what it was trained for and on, and its evaluation
out/metrics.jsonl, curve.png          loss and hits along the way
out/work/                             texts and the resumable state (work.py); may be deleted afterwards
"""

from __future__ import annotations

import functools
import gc
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from drafter.checkpoint import load_drafter
from drafter.config import DrafterConfig, TreeShape
from drafter.data import Sample, Window, pack, split_by_problem, windows
from drafter.loss import DraftBatch
from drafter.model import Drafter
from drafter.train import NonFiniteLossError, Report, StateError, TrainConfig, train
from trtkit.build.draft_head import check_head
from trtkit.chat import Chat, load_chat
from trtkit.checkpoint.hf import resolve_source
from trtkit.checkpoint.unified import UnifiedCheckpoint, open_unified
from trtkit.errors import CheckpointError, OutputError, QualityError, UsageError
from trtkit.files import read_json
from trtkit.log import Progress, logger
from trtkit.recipe import TRAINING_FILE
from trtkit.runtime.load import compute_dtype
from trtkit.runtime.model import DecoderModel
from trtkit.runtime.torch_options import Drafting
from trtkit.training.evaluate import DepthHits, TreeResult, hits_by_depth, measure_tree
from trtkit.training.measures import Measures
from trtkit.training.plan import TrainingPlan
from trtkit.training.processes import Processes, processes
from trtkit.training.publish import publish, token_order
from trtkit.training.rows import Row
from trtkit.training.target import draft_batch, target_engine
from trtkit.training.work import MEASURES_FILE, SAMPLES_FILE, WORK, claimed, read_samples, updates_saved, useless_state

__all__ = ["HeadReport", "TrainingPlan", "train_head"]

_EVALUATED = 64
"""Held-out solutions and problems that the evaluation looks at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadReport:
    """How good the head is on problems that it was not trained on."""

    updates: int
    parameters: int
    train_tokens: int
    held_out: int
    """Problems that were held out; at most 64 of them are measured on."""
    hits: tuple[DepthHits, ...]
    trees: tuple[TreeResult, ...]


def train_head(plan: TrainingPlan, out: Path, *, device: torch.device) -> HeadReport | None:
    """Train, save and measure a head. The same call continues an interrupted one.

    Under ``torchrun`` every process makes this call; the first one writes and returns the report, the others None.
    Raises :class:`InputError` for unusable rows, :class:`UsageError` when ``out`` holds another training or
    ``start_from`` has seen what would be held out, :class:`OutputError` when another process works there or it cannot
    be written, :class:`QualityError` when the loss is not finite (the last saved state stays in ``out/work``).
    """
    with processes(device, plan.parts) as among:
        return _train_head(plan, out, among)


def _train_head(plan: TrainingPlan, out: Path, among: Processes) -> HeadReport | None:
    directory = resolve_source(plan.model)
    chat = load_chat(directory)
    checkpoint = open_unified(directory)
    if plan.start_from is not None:
        # Now, not after the hours in which the target writes its answers.
        check_head(Path(plan.start_from), checkpoint.spec, chat)
        _check_held_out(Path(plan.start_from), plan.held_out)
    claim: AbstractContextManager[list[Row]] = claimed(out, plan) if among.first else nullcontext([])
    with claim as rows:
        return _train_and_measure(plan, out, among, rows, chat, checkpoint)


def _check_held_out(head: Path, share: float) -> None:
    """Refuse to measure on problems that ``head`` was trained on, as far as it says which these were."""
    path = head / TRAINING_FILE
    plan = read_json(path, CheckpointError).get("plan") if path.is_file() else None
    before = plan.get("held_out") if isinstance(plan, dict) else None
    if not isinstance(before, (int, float)):
        logger.warning("%s: does not say what it was trained on; what is held out now may have been part of it", head)
    elif share > before:
        raise UsageError(
            f"{share:.0%} of the problems would be held out, and the head was trained on all but {before:.0%}",
            where=str(head),
            hint=f"hold out {before:.0%} or less: else the head is measured on problems that it has seen",
        )


def _train_and_measure(
    plan: TrainingPlan, out: Path, among: Processes, rows: list[Row], chat: Chat, checkpoint: UnifiedCheckpoint
) -> HeadReport | None:
    dtype = compute_dtype(checkpoint.spec, among.device)
    model = DecoderModel(checkpoint, device=among.device, dtype=dtype, max_tokens=checkpoint.spec.max_positions + 64)
    work = out / WORK
    if among.first:
        samples = read_samples(plan, work, rows, chat, model, checkpoint)
    among.meet()
    if not among.first:
        samples = read_samples(plan, work, rows, chat, model, checkpoint)
    kept, held = split_by_problem(samples, plan.held_out)
    drafter = _fresh_head(plan, model, checkpoint)
    batches = _Batches(plan, kept, model)
    config = _train_config(plan, batches.per_epoch)
    lm_head = checkpoint.lm_head().to(among.device) if plan.objective == "kd" else None
    _train(drafter, batches, config, work, lm_head, shown=among.first)
    if not among.first:
        return None
    drafter.requires_grad_(False).eval()
    # What training has held makes room for keys and values: gradients, and moments that torch left in a cycle.
    drafter.zero_grad(set_to_none=True)
    gc.collect()
    measures = Measures(work / MEASURES_FILE, drafter, parts=1 + len(_measurements(plan)))
    report = HeadReport(
        updates=config.updates,
        parameters=drafter.config.parameters,
        train_tokens=sum(len(sample.tokens) for sample in kept),
        held_out=len({sample.problem for sample in held}),
        hits=measures.part(
            "hits",
            DepthHits,
            lambda: hits_by_depth(drafter, model, held[:_EVALUATED], depths=plan.depths, tokens=plan.tokens_per_part),
        ),
        trees=tuple(_measured(plan, measures, drafter, model, chat, held)),
    )
    training = {
        "version": 1,
        "plan": json.loads(json.dumps(asdict(plan))),
        "chat_template_sha256": chat.template_digest,
        "report": asdict(report),
    }
    publish(out, work, drafter, token_order(kept, drafter.config.vocab_size), training)
    return report


def _fresh_head(plan: TrainingPlan, model: DecoderModel, checkpoint: UnifiedCheckpoint) -> Drafter:
    spec = model.spec
    if plan.start_from is not None:
        return (
            load_drafter(Path(plan.start_from), dtype=torch.float32, device=model.device).requires_grad_(True).train()
        )
    config = DrafterConfig(
        hidden_size=spec.hidden,
        vocab_size=spec.vocab,
        exit_dim=plan.exit_dim or 2 * spec.hidden,
        num_draft_layers=plan.layers,
        rnn=plan.rnn,
    )
    torch.manual_seed(plan.seed)
    drafter = Drafter(config).to(model.device)
    # Warm start: the output layer begins as the target's own, reading the first H features.
    width = min(config.exit_dim, spec.hidden)
    with torch.no_grad():
        drafter.output.weight[:, :width] = checkpoint.lm_head()[:, :width]
    return drafter


def _train_config(plan: TrainingPlan, groups_per_epoch: int) -> TrainConfig:
    return TrainConfig(
        updates=max(1, round(plan.epochs * groups_per_epoch / plan.parts)),
        parts=plan.parts,
        peak_rate=plan.rate,
        depth_weights=tuple(0.8**depth for depth in range(plan.depths)),
        objective=plan.objective,
        dtype=plan.dtype,
    )


class _Batches:
    """The same batch for the same number: epochs are shuffled by seed, groups are numbered through."""

    def __init__(self, plan: TrainingPlan, samples: Sequence[Sample], model: DecoderModel) -> None:
        self._plan = plan
        self._samples = samples
        self._model = model
        self._epochs: list[list[list[Window]]] = []
        self.per_epoch = len(self._epoch(0))

    def _epoch(self, epoch: int) -> list[list[Window]]:
        while len(self._epochs) <= epoch:
            made = windows(self._samples, self._plan.window, seed=self._plan.seed, epoch=len(self._epochs))
            self._epochs.append(list(pack(made, self._plan.tokens_per_part)))
        return self._epochs[epoch]

    def group(self, number: int) -> list[Window]:
        epoch = 0
        while number >= len(self._epoch(epoch)):
            number -= len(self._epoch(epoch))
            epoch += 1
        return self._epoch(epoch)[number]

    def __call__(self, update: int, part: int) -> DraftBatch:
        return draft_batch(self._model, self.group(update * self._plan.parts + part))


def _train(
    drafter: Drafter,
    batch_of: Callable[[int, int], DraftBatch],
    config: TrainConfig,
    work: Path,
    lm_head: Tensor | None,
    *,
    shown: bool,
) -> None:
    there, _ = updates_saved(work) or (0, 0)
    if shown and there:
        logger.info("train: %d of %d updates are there already", there, config.updates)
    left = config.updates - there
    with Progress("train", total=left, unit="updates") if shown and left else nullcontext() as progress:

        def show(report: Report) -> None:
            assert progress is not None, "only the first process reports"
            hits = " ".join(f"{share:.0%}" for share in report.top1)
            progress.advance(
                report.update - there - progress.done, note=f"loss {report.loss:.3f}, top-1 by depth {hits}"
            )

        try:
            train(drafter, batch_of, config, work, lm_head=lm_head, on_report=show)
        except OSError as problem:
            raise OutputError(
                f"the state cannot be saved: {problem.strerror or problem}",
                where=str(work),
                hint="make room; the same command goes on from the last saved state",
            ) from None
        except StateError as problem:
            raise useless_state(problem) from None
        except NonFiniteLossError as problem:
            raise QualityError(
                str(problem),
                where=str(work),
                hint=f"lower --rate, and delete all of this folder but {SAMPLES_FILE} to start over",
            ) from None


def _measurements(plan: TrainingPlan) -> list[tuple[TreeShape, float]]:
    return [(tree, temperature) for tree in plan.trees for temperature in (0.0, 1.0)]


def _measured(
    plan: TrainingPlan, measures: Measures, drafter: Drafter, model: DecoderModel, chat: Chat, held: Sequence[Sample]
) -> Iterator[TreeResult]:
    head = drafter.to(dtype=model.dtype)
    prompts = [sample.tokens[: sample.prompt] for sample in held[:_EVALUATED]]
    longest = min(plan.max_tokens, model.spec.max_positions)

    def measured(tree: TreeShape, temperature: float) -> Iterator[TreeResult]:
        with target_engine(model, Drafting(head=head, trees=(tree,)), longest) as engine:
            yield measure_tree(
                engine, prompts, tree=tree, temperature=temperature, stop_ids=chat.eos_ids, max_tokens=longest
            )

    for tree, temperature in _measurements(plan):
        name = f"{tree} at temperature {temperature:g}"
        yield from measures.part(name, TreeResult, functools.partial(measured, tree, temperature))
