"""Worker: transformers ``generate``, sdpa attention, dynamic cache. float32 too: CPUs without bf16 arithmetic run it
faster."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peers.worker import Mark, Opened, Task, directory_bytes, run_worker, versions_of


class _Model:
    def __init__(self, task: Task) -> None:
        import torch
        import transformers

        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[task.variant]
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            task.model, dtype=dtype, attn_implementation="sdpa"
        ).eval()
        self.weight_bytes = directory_bytes(Path(task.model), "*.safetensors") * dtype.itemsize // 2

    def generate(self, prompt: Sequence[int], batch: int, new_tokens: int, seed: int, mark: Mark) -> list[list[int]]:
        import torch
        import transformers

        def stop(tokens: torch.Tensor, _scores: Any, **_more: Any) -> torch.Tensor:
            mark(batch * (tokens.shape[1] - len(prompt)))
            return torch.zeros(len(tokens), dtype=torch.bool)

        # Everything named: a checkpoint's generation_config.json may cut the distribution.
        asked = transformers.GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new_tokens,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        torch.manual_seed(seed)
        self._model.generation_config = asked
        prompts = torch.tensor([list(prompt)]).repeat(batch, 1)
        with torch.inference_mode():
            found = self._model.generate(
                prompts, attention_mask=torch.ones_like(prompts), generation_config=asked,
                stopping_criteria=transformers.StoppingCriteriaList([stop]),
            )  # fmt: skip
        return found[:, len(prompt) :].tolist()


def _load(task: Task) -> tuple[dict[str, str], Any]:
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(task.threads)
    return versions_of("transformers", "torch"), lambda: _opened(task)


def _opened(task: Task) -> Opened:
    return _Model(task)


if __name__ == "__main__":
    raise SystemExit(run_worker(lambda task: None, _load))
