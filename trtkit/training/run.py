"""Train a draft head from a model name and a source of rows to a directory that ``build --drafter`` takes.

out/config.json, model.safetensors    the head under the public names
out/training.json                     what it was trained for and on, and its evaluation
out/metrics.jsonl, curve.png          loss and hits along the way
out/work/                             samples and the resumable state; may be deleted afterwards
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from drafter.checkpoint import load_drafter
from drafter.config import DrafterConfig, TreeShape
from drafter.data import Sample, Window, pack, split_by_problem, windows
from drafter.loss import DraftBatch, Objective
from drafter.model import Drafter
from drafter.train import NonFiniteLossError, Report, TrainConfig, train
from trtkit.build.draft_head import check_head
from trtkit.chat import Chat, load_chat, variant_named
from trtkit.checkpoint.hf import resolve_source
from trtkit.checkpoint.unified import UnifiedCheckpoint, open_unified
from trtkit.errors import InputError, QualityError, UsageError
from trtkit.files import append_jsonl, read_json, read_jsonl, write_json
from trtkit.log import Progress
from trtkit.runtime.api import SamplingParams
from trtkit.runtime.load import compute_dtype
from trtkit.runtime.model import DecoderModel
from trtkit.runtime.torch_engine import Drafting, TorchEngine, TorchLimits
from trtkit.training.evaluate import DepthHits, TreeResult, hits_by_depth, measure_tree
from trtkit.training.processes import Processes, processes
from trtkit.training.publish import publish, token_order
from trtkit.training.rows import read_rows
from trtkit.training.target import draft_batch, own_answers, written_answers

__all__ = ["HeadReport", "TrainingPlan", "train_head"]

WORK = "work"
_EVALUATED = 64
"""Held-out solutions and problems that the evaluation looks at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """What to train, on what, how long."""

    model: str
    data: str
    """``openmathreasoning`` or a file of rows."""
    own: bool = True
    """Train on the target's own answers to the rows' problems instead of the rows' solutions."""
    rows: int = 20_000
    split: str = "cot"
    held_out: float = 0.05
    variants: tuple[str, ...] = ("solve", "reason")
    start_from: str | None = None
    """A trained head to go on from; its shape is taken over."""
    exit_dim: int | None = None
    """None: twice the hidden size, as published."""
    layers: int = 2
    rnn: bool = True
    window: int = 2048
    tokens_per_part: int = 8192
    """Tokens that the target runs over for one batch."""
    parts: int = 1
    """Batches of one update, shared out over the processes."""
    epochs: float = 1.0
    rate: float = 1e-3
    objective: Objective = "ce"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the arithmetic; the weights stay float32."""
    depths: int = 4
    seed: int = 0
    max_tokens: int = 4096
    """Longest solution."""
    trees: tuple[TreeShape, ...] = (TreeShape(beams=1, length=3), TreeShape(beams=4, length=4))
    """Shapes to decode with at the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadReport:
    """How good the head is on problems that it was not trained on."""

    updates: int
    parameters: int
    train_tokens: int
    hits: tuple[DepthHits, ...]
    trees: tuple[TreeResult, ...]


def train_head(plan: TrainingPlan, out: Path, *, device: torch.device) -> HeadReport | None:
    """Train, save and measure a head. The same call continues an interrupted one.

    Under ``torchrun`` every process makes this call; the first one writes and returns the report, the others None.
    Raises :class:`InputError` for unusable rows, :class:`UsageError` when ``out`` holds another training,
    :class:`QualityError` when the loss is not finite (the last saved state stays in ``out/work``).
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
    dtype = compute_dtype(checkpoint.spec, among.device)
    model = DecoderModel(checkpoint, device=among.device, dtype=dtype, max_tokens=checkpoint.spec.max_positions + 64)
    work = out / WORK
    if among.first:
        _claim(work, plan)
        samples = _samples(plan, work, chat, model)
    among.meet()
    if not among.first:
        samples = _samples(plan, work, chat, model)
    kept, held = split_by_problem(samples, plan.held_out)
    if not kept or not held:
        raise InputError(
            f"{len(samples)} usable solutions are too few to train and to hold some out", hint="pass more rows"
        )
    drafter = _fresh_head(plan, model, checkpoint)
    batches = _Batches(plan, kept, model)
    config = _train_config(plan, batches.per_epoch)
    lm_head = checkpoint.lm_head().to(among.device) if plan.objective == "kd" else None
    _train(drafter, batches, config, work, lm_head, shown=among.first)
    if not among.first:
        return None
    drafter.requires_grad_(False).eval()
    report = HeadReport(
        updates=config.updates,
        parameters=drafter.config.parameters,
        train_tokens=sum(len(sample.tokens) for sample in kept),
        hits=tuple(hits_by_depth(drafter, model, held[:_EVALUATED], depths=plan.depths, tokens=plan.tokens_per_part)),
        trees=tuple(_measured(plan, drafter, model, chat, held)),
    )
    training = {
        "version": 1,
        "plan": json.loads(json.dumps(asdict(plan))),
        "chat_template_sha256": chat.template_digest,
        "report": asdict(report),
    }
    publish(out, work, drafter, token_order(kept, drafter.config.vocab_size), training)
    return report


def _claim(work: Path, plan: TrainingPlan) -> None:
    data = json.loads(json.dumps(asdict(plan)))
    path = work / "plan.json"
    if path.is_file():
        there = read_json(path)
        different = [f"{k}: {there.get(k)} there, {v} now" for k, v in data.items() if there.get(k) != v]
        if different:
            raise UsageError(
                "this directory holds another training",
                where=str(work.parent),
                offenders=different,
                hint="choose another --out, or delete its work/ folder",
            )
        return
    write_json(path, data)


def _samples(plan: TrainingPlan, work: Path, chat: Chat, model: DecoderModel) -> list[Sample]:
    """Tokenized solutions, made once and kept in ``work``."""
    path = work / "samples.jsonl"
    if not path.is_file():
        rows = read_rows(plan.data, count=plan.rows, split=plan.split, solutions=not plan.own)
        variants = [variant_named(name) for name in plan.variants]
        longest = min(plan.max_tokens, model.spec.max_positions)
        if plan.own:
            # The Fast-Math cards' sampling would cut the tail; the head should know the model at temperature 1.
            with _engine(model, None, longest) as engine:
                made = own_answers(
                    rows, engine, chat, variants, sampling=SamplingParams(), max_tokens=longest, seed=plan.seed
                )
        else:
            made = written_answers(rows, chat, variants, max_tokens=longest)
        aside = work / "samples.tmp"
        aside.unlink(missing_ok=True)
        append_jsonl(aside, (asdict(sample) for sample in made))
        aside.rename(path)
    return [
        Sample(problem=row["problem"], tokens=tuple(row["tokens"]), prompt=row["prompt"]) for _, row in read_jsonl(path)
    ]


def _engine(model: DecoderModel, drafting: Drafting | None, total_tokens: int) -> TorchEngine:
    rows, size = 32, 16
    blocks = rows * (total_tokens // size + 3)
    limits = TorchLimits(rows=rows, total_tokens=total_tokens, kv_blocks=blocks, block_size=size)
    return TorchEngine(model, limits, drafting)


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
    with Progress("train", total=config.updates, unit="updates") if shown else nullcontext() as progress:

        def show(report: Report) -> None:
            assert progress is not None, "only the first process reports"
            hits = " ".join(f"{share:.0%}" for share in report.top1)
            progress.advance(report.update - progress.done, note=f"loss {report.loss:.3f}, top-1 by depth {hits}")

        try:
            train(drafter, batch_of, config, work, lm_head=lm_head, on_report=show)
        except NonFiniteLossError as problem:
            raise QualityError(
                str(problem), where=str(work), hint="the last saved state is good; lower --rate and start over"
            ) from None


def _measured(
    plan: TrainingPlan, drafter: Drafter, model: DecoderModel, chat: Chat, held: Sequence[Sample]
) -> Iterator[TreeResult]:
    head = drafter.to(dtype=model.dtype)
    prompts = [sample.tokens[: sample.prompt] for sample in held[:_EVALUATED]]
    longest = min(plan.max_tokens, model.spec.max_positions)
    for tree in plan.trees:
        for temperature in (0.0, 1.0):
            with _engine(model, Drafting(head=head, trees=(tree,)), longest) as engine:
                yield measure_tree(
                    engine, prompts, tree=tree, temperature=temperature, stop_ids=chat.eos_ids, max_tokens=longest
                )
