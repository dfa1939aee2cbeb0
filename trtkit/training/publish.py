"""The files of a finished head: weights, token order, what it was trained on, its learning curve."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from drafter.checkpoint import CONFIG_FILE, save_drafter
from drafter.data import Sample
from drafter.model import Drafter
from drafter.train import METRICS_FILE
from trtkit.errors import OutputError
from trtkit.files import write_json, write_text
from trtkit.log import logger
from trtkit.recipe import TOKEN_ORDER_FILE, TRAINING_FILE
from trtkit.staging import staged_dir

__all__ = ["publish", "token_order"]


def token_order(samples: Sequence[Sample], vocab: int) -> Tensor:
    """All token ids, int32 (V,), the most frequent one of the completions first, the lower id on a tie."""
    counts = torch.zeros(vocab, dtype=torch.int64)
    for sample in samples:
        counts += torch.bincount(torch.tensor(sample.tokens[sample.prompt :], dtype=torch.int64), minlength=vocab)
    return counts.argsort(descending=True, stable=True).int()


def publish(out: Path, work: Path, drafter: Drafter, order: Tensor, training: Mapping[str, Any]) -> None:
    """Move the finished head, its token order, ``training`` (training.json) and the curve to ``out``.

    They are written in ``work`` first: ``out`` holds whole files only. Raises :class:`OutputError`.
    """
    try:
        with staged_dir(work / "head", replace=True) as stage:
            save_drafter(drafter, stage, dtype=torch.bfloat16)
            save_file({"by_frequency": order}, stage / TOKEN_ORDER_FILE)
            write_json(stage / TRAINING_FILE, training)
    except SafetensorError as problem:  # for a full disk, too
        raise OutputError(
            f"the head cannot be written: {problem}", where=str(out), hint="make room, and run the same command again"
        ) from None
    # The configuration last: with it the directory is a head.
    for path in sorted((work / "head").iterdir(), key=lambda path: path.name == CONFIG_FILE):
        path.chmod(0o644)  # safetensors writes for the owner alone
        path.replace(out / path.name)
    (work / "head").rmdir()
    path = work / METRICS_FILE
    if path.is_file() and (metrics := path.read_text(encoding="utf-8")):
        write_text(out / METRICS_FILE, metrics)
        _plot([json.loads(line) for line in metrics.splitlines()], out / "curve.png")


def _plot(reports: Sequence[dict[str, Any]], path: Path) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        logger.info("no curve.png: matplotlib is not installed (pip install 'trtkit[report]')")
        return
    updates = [report["update"] for report in reports]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for depth in range(len(reports[0]["by_depth"])):
        left.plot(updates, [report["by_depth"][depth] for report in reports], label=f"depth {depth + 1}")
        (line,) = right.plot(updates, [report["top1"][depth] for report in reports], label=f"depth {depth + 1}")
        right.plot(updates, [report["top5"][depth] for report in reports], color=line.get_color(), linestyle=":")
    left.set(xlabel="update", ylabel="loss (nats)", title="Loss by depth", yscale="log")
    right.set(xlabel="update", ylabel="share right", ylim=(0, 1), title="Hits by depth: top-1, dotted top-5")
    left.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
