"""The peer beside our figures: ``transformers`` ``generate`` with a static cache on the same device, same shape.

Run as a process of its own, so that a slow compilation can be stopped::

    python -m trtkit.bench.gpu_peer SHAPE DEVICE CONTEXT NEW_TOKENS

Prints a JSON line for each figure as it comes: decoding launched step by step, then compiled (``torch.compile``, as
generate does it for static caches).
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch

from trtkit.bench.random_model import shape_spec
from trtkit.model_spec import spec_to_config

__all__ = ["main", "measure_peer", "random_peer"]


def measure_peer(model: Any, context: int, new_tokens: int, *, compiled: bool) -> float:
    """Tokens per second of greedy decoding with batch 1 in bfloat16, prefill taken out by a difference."""
    device = model.device
    ids = torch.randint(0, model.config.vocab_size, (1, context), device=device)

    def seconds(count: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False,
            cache_implementation="static", disable_compile=not compiled, pad_token_id=0,
        )  # fmt: skip
        assert out.shape[1] == context + count
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    # Two warm-ups: the second has the cache's length of the timed run, which the compiled graph is made for.
    short = max(2, new_tokens // 8)
    for count in (short, new_tokens):
        seconds(count)
    least = min(seconds(short) for _ in range(2))
    return (new_tokens - short) / max(min(seconds(new_tokens) for _ in range(2)) - least, 1e-9)


def random_peer(shape: str, device: torch.device) -> Any:
    """The same shape in transformers, with random weights made on the device."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    foreign = ("architectures", "model_type", "torch_dtype")
    fields = {key: value for key, value in spec_to_config(shape_spec(shape)).items() if key not in foreign}
    with torch.device("meta"):
        made: Any = Qwen2ForCausalLM(Qwen2Config(**fields))
    made = made.bfloat16().to_empty(device=device).eval().requires_grad_(False)
    for parameter in made.parameters():
        parameter.normal_(0, 0.02)
    # Its frequencies are a buffer, which to_empty has left without numbers.
    made.model.rotary_emb = type(made.model.rotary_emb)(config=made.config).to(device)
    made.generation_config.eos_token_id = None
    return made


def main(arguments: list[str]) -> int:
    """SHAPE DEVICE CONTEXT NEW_TOKENS."""
    shape, device, context, new_tokens = arguments
    model = random_peer(shape, torch.device(device))
    for compiled in (False, True):
        speed = measure_peer(model, int(context), int(new_tokens), compiled=compiled)
        sys.stdout.write(json.dumps({"compiled": compiled, "tokens_per_second": speed}) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
