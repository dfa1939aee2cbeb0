"""A draft head made ready to draft: the runtime's kernels, a trimmed vocabulary, an 8-bit output layer.

At 14B the published head has 1.8B weights, most of them in its own output layer, and all are read at every drafted
position. Drafting only the most frequent tokens, or from int8 codes, makes that cheaper and drafts a little worse; the
emitted tokens are the same, because the target decides on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from drafter.checkpoint import DrafterError, load_drafter
from drafter.config import TreeShape
from drafter.model import Drafter
from trtkit.checkpoint.rank_share import share_rows
from trtkit.errors import EngineError, UsageError
from trtkit.files import read_json
from trtkit.model_spec import ModelSpec
from trtkit.quant.in_cache import int8_matrix
from trtkit.quant.tensor import LinearWeights, dense
from trtkit.recipe import TOKEN_ORDER_FILE, TRAINING_FILE
from trtkit.runtime.cuda.linear import prepare_linears
from trtkit.runtime.linear import Kernel, runtime_linear
from trtkit.runtime.native.draft import Chain, open_chain
from trtkit.runtime.ranks.group import Ranks, gather_columns

__all__ = [
    "REBUILD",
    "DraftPrecision",
    "HeadOptions",
    "measured_acceptance",
    "open_head",
    "prepare_head",
    "with_kernels",
]

DraftPrecision: TypeAlias = Literal["model", "int8"]


REBUILD = "build the engine again with --drafter, or without a tree"
"""What to do about an engine's own head that cannot be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadOptions:
    """How to run a draft head."""

    vocabulary: int | None = None
    """Draft only the N tokens that were most frequent in the head's training text."""
    precision: DraftPrecision = "model"
    """Of the output layer: the model's dtype, or int8 codes with a scale per token."""

    def __post_init__(self) -> None:
        wrong = []
        if self.vocabulary is not None and self.vocabulary < 1:
            wrong.append(f"draft vocabulary {self.vocabulary}: must be at least 1")
        if self.precision not in ("model", "int8"):
            wrong.append(f"draft precision {self.precision!r}: must be model or int8")
        if wrong:
            raise UsageError("options that make no sense", offenders=wrong)


def open_head(
    directory: Path, spec: ModelSpec, options: HeadOptions, *, device: torch.device, dtype: torch.dtype,
    embedding: Tensor | None = None, ranks: Ranks | None = None, hint: str = REBUILD,
) -> Drafter:  # fmt: skip
    """The head in ``directory``, ready to draft for a model of ``spec``; ``embedding`` as in :func:`with_kernels`.
    ``hint``: what to do where it cannot be read.

    Raises :class:`EngineError` when it cannot be read or belongs to another model, :class:`UsageError` when the
    vocabulary cannot be trimmed.
    """
    alone = ranks is None
    try:
        head = load_drafter(directory, dtype=dtype, device=device if alone else torch.device("cpu"))
    except DrafterError as problem:
        raise EngineError(str(problem), hint=hint) from None
    if (head.config.hidden_size, head.config.vocab_size) != (spec.hidden, spec.vocab):
        raise EngineError(
            f"the draft head is for hidden size {head.config.hidden_size} and vocabulary {head.config.vocab_size}, "
            f"the model has {spec.hidden} and {spec.vocab}",
            where=str(directory),
            hint="train a head for this model",
        )
    if options.vocabulary is not None and options.vocabulary < spec.vocab:
        head.trim(_most_frequent(directory, options.vocabulary, spec.vocab).to(head.output.weight.device))
    return with_kernels(head, options.precision, device=device, dtype=dtype, ranks=ranks, embedding=embedding)


def measured_acceptance(directory: Path) -> dict[TreeShape, tuple[float, ...]]:
    """What ``training.json`` beside a head says of its acceptance by tree, at the highest temperature measured."""
    path = directory / TRAINING_FILE
    if not path.is_file():
        return {}
    found: dict[TreeShape, tuple[float, tuple[float, ...]]] = {}
    try:
        for row in read_json(path, EngineError)["report"]["trees"]:
            beams, length = (int(part) for part in row["tree"].split("x"))
            shape, temperature = TreeShape(beams=beams, length=length), float(row["temperature"])
            shares = tuple(float(share) for share in row["accepted_by_depth"])
            if not all(0 <= share <= 1 for share in shares):
                return {}  # a NaN would stay for ever
            if shape not in found or temperature >= found[shape][0]:
                found[shape] = (temperature, shares)
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}  # a head from elsewhere: its acceptance is learned while it runs
    return {shape: shares for shape, (_, shares) in found.items()}


def _most_frequent(directory: Path, count: int, vocab: int) -> Tensor:
    path = directory / TOKEN_ORDER_FILE
    if not path.is_file():
        raise UsageError(
            f"the head has no {TOKEN_ORDER_FILE}, so nobody knows its most frequent tokens",
            where=str(directory),
            hint="train it with `trtkit train-drafter`, or draft the whole vocabulary",
        )
    try:
        order = load_file(path)["by_frequency"].long()
    except (OSError, SafetensorError, KeyError):
        order = torch.empty(0, dtype=torch.int64)
    if sorted(order.tolist()) != list(range(vocab)):
        raise EngineError(f"does not list every one of {vocab} tokens once", where=str(path))
    return order[:count]


class _KernelLinear(nn.Module):
    """A linear layer behind one of the runtime's kernels; of several ranks each has its share of the ``width`` rows."""

    def __init__(self, kernel: Kernel, width: int, ranks: Ranks | None) -> None:
        super().__init__()
        self.kernel, self._width, self._ranks = kernel, width, ranks

    def forward(self, x: Tensor) -> Tensor:
        found = self.kernel(x.reshape(-1, x.shape[-1]))
        if self._ranks is not None:
            found = gather_columns(self._ranks, found, self._width)
        return found.view(*x.shape[:-1], -1)


def prepare_head(head: Drafter, tokens: int) -> None:
    """As ``DecoderModel.prepare``: ``tokens`` is rows x beams."""
    prepare_linears([layer.kernel for layer in head.modules() if isinstance(layer, _KernelLinear)], tokens)


def _chain(head: Drafter, embedding: Tensor) -> Chain | None:
    layers = [head.rnn_w, head.rnn_u, head.input_proj, *head.blocks, head.output]
    kernels = [layer.kernel for layer in layers if isinstance(layer, _KernelLinear)]
    return open_chain(head.config, kernels, embedding, head.token_ids)


def with_kernels(
    head: Drafter, precision: DraftPrecision = "model", *, device: torch.device, dtype: torch.dtype,
    ranks: Ranks | None = None, embedding: Tensor | None = None,
) -> Drafter:  # fmt: skip
    """``head`` with every linear layer behind the runtime's kernel for this device, and with the target's ``embedding``
    (V, H) one call for a whole chain, where there is one. The head itself is changed.

    Of several ``ranks`` each reads its share of every layer's rows: at 14B the head has an eighth of all weights, and a
    step reads it once for every drafted token.
    """
    for parent in (head, head.blocks):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear):
                matrix, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
                if ranks is not None:
                    matrix = share_rows(matrix, ranks.rank, ranks.size)
                    bias = None if bias is None else share_rows(bias, ranks.rank, ranks.size)
                coded = precision == "int8" and layer is head.output
                weight = int8_matrix(matrix.cpu(), steps=128) if coded else dense(matrix)
                kernel = runtime_linear(LinearWeights(weight=weight, bias=bias), device=device, dtype=dtype)
                setattr(parent, name, _KernelLinear(kernel, layer.out_features, ranks))
    head.token_ids = None if head.token_ids is None else head.token_ids.to(device)
    if embedding is not None and ranks is None:
        head.chain = _chain(head, embedding)
    return head
