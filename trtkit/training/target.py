"""The frozen target of a draft head: its format of text, and its hidden states over windows of it.

Letters: T tokens, H hidden, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from drafter.data import Sample, Window
from drafter.loss import DraftBatch
from trtkit.chat import Chat, PromptVariant
from trtkit.decoder import Attend, causal_attention
from trtkit.runtime.blocks import blocks_for
from trtkit.runtime.kv_cache import kv_block_bytes
from trtkit.runtime.load import kv_bytes
from trtkit.runtime.model import DecoderModel
from trtkit.runtime.thread_choice import ThreadChooser
from trtkit.runtime.torch_engine import TorchEngine
from trtkit.runtime.torch_options import Drafting, TorchLimits
from trtkit.training.rows import Row

__all__ = ["draft_batch", "target_engine", "written_answers"]


def written_answers(
    rows: Sequence[Row], chat: Chat, variants: Sequence[PromptVariant], *, max_tokens: int
) -> list[Sample]:
    """The rows' solutions in the deployed chat format, cut to ``max_tokens``; variants in turns."""
    samples = []
    for index, row in enumerate(rows):
        assert row.solution is not None
        prompt = chat.prompt(row.problem, variants[index % len(variants)])
        tokens = (*prompt, *chat.completion(prompt, row.solution))[:max_tokens]
        if len(tokens) > len(prompt):
            samples.append(Sample(problem=row.problem, tokens=tokens, prompt=len(prompt)))
    return samples


def target_engine(model: DecoderModel, drafting: Drafting | None, total_tokens: int) -> TorchEngine:
    """An engine of 32 rows over weights that are already in memory; keys and values take what room there is, at most.

    On a CPU its steps take up to as many threads as are set, the fastest number; as many are set again when it closes.
    """
    rows, size = 32, 16
    nodes = max((tree.max_nodes for tree in drafting.trees if tree) if drafting else (), default=1)
    least = blocks_for(total_tokens + nodes, size) + 1  # a lone row, with its copy of a shared block
    room = kv_bytes(model.device) // kv_block_bytes(model.spec, "model", model.dtype, size)
    limits = TorchLimits(
        rows=rows, total_tokens=total_tokens, kv_blocks=max(least, min(room, rows * least)), block_size=size
    )
    threads = torch.get_num_threads()
    adapts = model.device.type == "cpu" and threads > 1
    return TorchEngine(model, limits, drafting, ThreadChooser(threads) if adapts else None)


@torch.no_grad()
def draft_batch(model: DecoderModel, windows: Sequence[Window]) -> DraftBatch:
    """Hidden states of the frozen target over the windows, in one forward over their prefixes, without padding."""
    device = model.device
    lengths = [window.end for window in windows]
    tokens = torch.tensor([token for w in windows for token in w.sample.tokens[: w.end]], device=device)
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])

    def attend(_layer: int) -> Attend:
        return lambda q, k, v: _attend_each(lengths, q, k, v)

    hidden = model.forward(tokens, positions, attend)
    inside = torch.cat([torch.arange(w.end, device=device) >= w.start for w in windows])
    scored = torch.cat([torch.arange(w.end, device=device) >= max(w.sample.prompt, w.start) for w in windows])
    segment = torch.arange(len(windows), device=device).repeat_interleave(
        torch.tensor(lengths, device=device), output_size=len(tokens)
    )
    kept = tokens[inside]
    return DraftBatch(
        tokens=kept,
        hidden=hidden[inside],
        embeddings=model.embed(kept),
        segment=segment[inside],
        scored=scored[inside],
    )


def _attend_each(lengths: list[int], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)  # type: ignore[no-untyped-call]
    return torch.cat([causal_attention(*part) for part in parts])
