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
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM, StoppingCriteria

from trtkit.bench.random_model import shape_spec
from trtkit.model_spec import spec_to_config

__all__ = ["main", "measure_peer", "random_peer"]


class _Clock(StoppingCriteria):
    """Notes when each token is there; never stops."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        if input_ids.device.type == "cuda":
            torch.cuda.synchronize(input_ids.device)
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def measure_peer(model: Any, context: int, new_tokens: int, *, compiled: bool) -> float:
    """Tokens per second of greedy decoding with batch 1 in bfloat16, without the prefill and the first few tokens."""
    ids = torch.randint(0, model.config.vocab_size, (1, context), device=model.device)
    for _ in range(2):  # the first one compiles
        clock = _Clock()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
            do_sample=False, cache_implementation="static", disable_compile=not compiled, pad_token_id=0,
            stopping_criteria=[clock],
        )  # fmt: skip
    assert len(clock.times) == new_tokens
    skipped = new_tokens // 4
    return (new_tokens - 1 - skipped) / (clock.times[-1] - clock.times[skipped])


def random_peer(shape: str, device: torch.device) -> Any:
    """The same shape in transformers, with random weights made on the device."""
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
