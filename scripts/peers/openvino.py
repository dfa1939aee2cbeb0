"""Worker: OpenVINO GenAI's continuous batching; exported by optimum-intel, weights compressed by nncf without data."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peers.worker import Mark, Opened, Task, directory_bytes, run_worker, versions_of

VARIANTS = {
    "bf16": (),  # as the checkpoint has it
    "int8": ("--weight-format", "int8"),
    "int4": ("--weight-format", "int4", "--group-size", "128", "--ratio", "1.0"),
}


def _prepare(task: Task) -> None:
    out = Path(task.prepared)
    if out.is_dir():
        return
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    program = str(Path(sys.executable).with_name("optimum-cli"))
    code = subprocess.call(
        [program, "export", "openvino", "--model", task.model, "--task", "text-generation-with-past",
         *VARIANTS[task.variant], str(part)]
    )  # fmt: skip
    if code:
        raise SystemExit(code)  # it has said why
    part.rename(out)


class _Model:
    def __init__(self, task: Task) -> None:
        import openvino_genai

        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = max(4096, max(task.batches) * (len(task.prompt) + 8))
        # The same prompt in every run must be computed in every run.
        scheduler.enable_prefix_caching = False
        scheduler.max_num_seqs = max(task.batches)
        scheduler.cache_size = 2  # GB
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            task.prepared, scheduler, "CPU", {"INFERENCE_NUM_THREADS": task.threads}
        )
        self.weight_bytes = directory_bytes(Path(task.prepared), "openvino_model.bin")
        self._requests = 0

    def generate(self, prompt: Sequence[int], batch: int, new_tokens: int, seed: int, mark: Mark) -> list[list[int]]:
        import numpy
        import openvino
        import openvino_genai

        ids = openvino.Tensor(numpy.array([list(prompt)], dtype=numpy.int64))
        handles = []
        for row in range(batch):
            asked = openvino_genai.GenerationConfig()
            # A fresh configuration cuts nothing: top_k is off and top_p 1.
            asked.do_sample, asked.temperature, asked.rng_seed = True, 1.0, seed + row
            asked.max_new_tokens, asked.ignore_eos = new_tokens, True
            self._requests += 1
            handles.append(self._pipeline.add_request(self._requests, ids, asked))
        rows: list[list[int]] = [[] for _ in handles]
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            for row, handle in zip(rows, handles, strict=True):
                while handle.can_read():
                    for output in handle.read().values():
                        row += output.generated_ids
            mark(sum(map(len, rows)))
        return rows


def _load(task: Task) -> tuple[dict[str, str], Any]:
    import openvino_genai  # noqa: F401

    return versions_of("openvino-genai", "openvino"), lambda: _opened(task)


def _opened(task: Task) -> Opened:
    return _Model(task)


if __name__ == "__main__":
    raise SystemExit(run_worker(_prepare, _load))
