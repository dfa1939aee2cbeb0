"""Worker: llama.cpp through llama-cpp-python's C bindings, one decode call and B sampler chains per step."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peers.worker import Mark, Opened, Task, run_worker, versions_of

VARIANTS = ("BF16", "Q8_0", "Q4_0")


def _prepare(task: Task) -> None:
    """bf16 once, then llama.cpp's own quantizer."""
    import llama_cpp

    from peers.llama_gguf import write_gguf

    out = Path(task.prepared)
    plain = out.parent / "BF16.gguf"
    if not plain.is_file():
        write_gguf(Path(task.model), plain.with_suffix(".part"))
        plain.with_suffix(".part").rename(plain)
    if task.variant == "BF16" or _file(task).is_file():
        return
    llama_cpp.llama_backend_init()
    options = llama_cpp.llama_model_quantize_default_params()
    options.nthread = task.threads
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{task.variant}")
    part = _file(task).with_suffix(".part")
    code = llama_cpp.llama_model_quantize(str(plain).encode(), str(part).encode(), ctypes.byref(options))
    if code:
        raise SystemExit(f"llama_model_quantize failed with code {code}")
    part.rename(_file(task))


def _file(task: Task) -> Path:
    return Path(task.prepared).parent / f"{task.variant}.gguf"


class _Model:
    def __init__(self, task: Task) -> None:
        import llama_cpp

        self._api: Any = llama_cpp
        self._task = task
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            str(_file(task)).encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {_file(task)}")
        self.weight_bytes = _file(task).stat().st_size
        self._made: tuple[int, Any] | None = None

    def generate(self, prompt: Sequence[int], batch: int, new_tokens: int, seed: int, mark: Mark) -> list[list[int]]:
        api = self._api
        context = self._context(batch)
        samplers = [self._sampler(seed + row) for row in range(batch)]
        # The prompt is computed once and its cache copied to the other sequences.
        filled = api.llama_batch_init(len(prompt), 0, 1)
        _fill(filled, [(token, place, 0, place == len(prompt) - 1) for place, token in enumerate(prompt)])
        self._decode(context, filled)
        memory = api.llama_get_memory(context)
        for row in range(1, batch):
            api.llama_memory_seq_cp(memory, 0, row, -1, -1)
        rows = [[api.llama_sampler_sample(sampler, context, -1)] for sampler in samplers]
        mark(batch)
        step = api.llama_batch_init(batch, 0, 1)
        for place in range(len(prompt), len(prompt) + new_tokens - 1):
            _fill(step, [(tokens[-1], place, row, True) for row, tokens in enumerate(rows)])
            self._decode(context, step)
            for row, sampler in enumerate(samplers):
                rows[row].append(api.llama_sampler_sample(sampler, context, row))
            mark(sum(map(len, rows)))
        for sampler in samplers:
            api.llama_sampler_free(sampler)
        api.llama_batch_free(filled)
        api.llama_batch_free(step)
        return rows

    def _context(self, batch: int) -> Any:
        """An empty context for ``batch`` sequences; the warm-up makes it, the timed run finds it."""
        if self._made and self._made[0] == batch:
            self._api.llama_memory_clear(self._api.llama_get_memory(self._made[1]), True)
            return self._made[1]
        if self._made:
            self._api.llama_free(self._made[1])
        options = self._api.llama_context_default_params()
        # The cache is divided among the sequences, each share rounded by llama.cpp.
        options.n_ctx = batch * (-(-self._task.total_tokens // 256) * 256)
        options.n_batch = max(512, len(self._task.prompt), batch)
        options.n_seq_max = batch
        options.n_threads = options.n_threads_batch = self._task.threads
        options.no_perf = True
        context = self._api.llama_init_from_model(self._model, options)
        if not context:
            raise SystemExit(f"llama.cpp cannot make a context for {batch} sequences")
        self._made = batch, context
        return context

    def _sampler(self, seed: int) -> Any:
        chain = self._api.llama_sampler_chain_init(self._api.llama_sampler_chain_default_params())
        self._api.llama_sampler_chain_add(chain, self._api.llama_sampler_init_temp(1.0))
        self._api.llama_sampler_chain_add(chain, self._api.llama_sampler_init_dist(seed))
        return chain

    def _decode(self, context: Any, batch: Any) -> None:
        code = self._api.llama_decode(context, batch)
        if code:
            raise SystemExit(f"llama_decode failed with code {code}")


def _fill(batch: Any, entries: list[tuple[int, int, int, bool]]) -> None:
    """(token, position, sequence, wants logits) of each row."""
    batch.n_tokens = len(entries)
    for index, (token, place, sequence, wanted) in enumerate(entries):
        batch.token[index] = token
        batch.pos[index] = place
        batch.n_seq_id[index] = 1
        batch.seq_id[index][0] = sequence
        batch.logits[index] = wanted


def _load(task: Task) -> tuple[dict[str, str], Any]:
    import llama_cpp  # noqa: F401

    return versions_of("llama-cpp-python"), lambda: _opened(task)


def _opened(task: Task) -> Opened:
    return _Model(task)


if __name__ == "__main__":
    raise SystemExit(run_worker(_prepare, _load))
