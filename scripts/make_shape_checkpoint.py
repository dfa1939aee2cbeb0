#!/usr/bin/env python
"""Write a checkpoint of random bf16 weights in a real model's shape, for streaming tests and benchmarks.

    scripts/make_shape_checkpoint.py --like 14b /tmp/random-14b

The values are normal with standard deviation 0.02 (one block of 16 M draws, read from a random place for each tensor: a
28 GB checkpoint is then written about as fast as the disk takes it). There is no tokenizer: it cannot be solved with.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from trtkit.checkpoint.shard_writer import ShardWriter
from trtkit.checkpoint.unified import unified_layout
from trtkit.errors import TrtkitError
from trtkit.files import write_json
from trtkit.log import Progress, set_up_logging
from trtkit.model_spec import ModelSpec, RopeSpec, spec_to_config
from trtkit.scheme import SCHEMES
from trtkit.staging import staged_dir

_DRAWS = 1 << 24

# layers, hidden, heads, kv heads, intermediate, vocabulary, tied: the Qwen2.5 shapes.
SHAPES = {
    "0.5b": (24, 896, 14, 2, 4864, 151936, True),
    "1.5b": (28, 1536, 12, 2, 8960, 151936, True),
    "7b": (28, 3584, 28, 4, 18944, 152064, False),
    "14b": (48, 5120, 40, 8, 13824, 152064, False),
}


def shape_spec(name: str, layers: int | None = None) -> ModelSpec:
    """The Qwen2 spec of that size, with fewer layers if asked."""
    depth, hidden, heads, kv_heads, intermediate, vocab, tied = SHAPES[name]
    return ModelSpec(
        family="qwen2", layers=layers or depth, hidden=hidden, heads=heads, kv_heads=kv_heads,
        head_dim=hidden // heads, intermediate=intermediate, vocab=vocab, rope=RopeSpec(theta=1e6), norm_eps=1e-6,
        qkv_bias=True, qk_norm=False, tied=tied, max_positions=32768, dtype="bfloat16",
    )  # fmt: skip


def write_checkpoint(spec: ModelSpec, out: Path, *, seed: int = 0, force: bool = False) -> None:
    """Write ``spec`` with random weights to ``out``."""
    source = random.Random(seed)
    draws = torch.empty(_DRAWS).normal_(0, 0.02, generator=torch.Generator().manual_seed(seed)).bfloat16()
    layout = unified_layout(spec, SCHEMES["bf16"], pre_scale=False)
    with staged_dir(out, replace=force) as stage, Progress("write", total=len(layout), unit="tensors") as progress:
        writer = ShardWriter(stage, layout, shard_bytes=4_000_000_000)
        for name, (_, shape) in layout.items():
            writer.write(name, torch.ones(shape).bfloat16() if "norm" in name else _values(draws, shape, source))
            progress.advance()
        writer.close()
        write_json(stage / "config.json", spec_to_config(spec))


def _values(draws: Tensor, shape: tuple[int, ...], source: random.Random) -> Iterator[Tensor]:
    left, start = math.prod(shape), source.randrange(_DRAWS)
    while left:
        piece = draws[start : start + left]
        yield piece
        left, start = left - piece.numel(), 0


def main() -> int:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--like", choices=SHAPES, default="14b")
    parser.add_argument("--layers", type=int, help="fewer layers than the real model")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    arguments = parser.parse_args()
    set_up_logging()
    try:
        write_checkpoint(shape_spec(arguments.like, arguments.layers), arguments.out, force=arguments.force)
    except TrtkitError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
