"""The laboratory of the GPU checklist: tiny engines of the practice checkpoint, and how to compare what they say."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from drafter.checkpoint import save_drafter
from drafter.config import DrafterConfig, TreeShape
from drafter.model import Drafter
from trtkit.build.bundle import Sources, build_trtllm
from trtkit.build.native import build_native
from trtkit.bundled import PRACTICE, practice_dir
from trtkit.chat import VARIANTS, load_chat
from trtkit.model_spec import read_model_spec
from trtkit.recipe import Limits, Recipe
from trtkit.runtime.api import Engine, FinishReason, Request, SamplingParams
from trtkit.runtime.load import OpenOptions, open_engine
from trtkit.runtime.trtllm_engine import ExecutorOptions, open_compiled

__all__ = ["GOOD", "POOR", "TOKENS", "FailedError", "Lab", "SkippedError", "agreement", "run_requests"]

_ASKED = ("What is 2 + 3?", "What is 7 - 4?", "What is 6 * 7?", "What is 9 mod 4?")
_LIMITS = Limits(batch=8, prompt_tokens=256, total_tokens=512)
GOOD, POOR = 0.95, 0.5
"""Shares of equal tokens: below the first it is more than ties, below the second it is another model."""
TOKENS = 48
"""Length of every sample."""


class FailedError(Exception):
    """The experiment ran and shows that something is wrong."""


class SkippedError(Exception):
    """This machine cannot show it."""


class Lab:
    """Engines of the practice checkpoint, built when they are asked for and kept until the end."""

    def __init__(self, scratch: Path, gpu: str, devices: int, *, torch_device: str = "auto") -> None:
        self.scratch, self.gpu, self.devices = scratch, gpu, devices
        self._torch_device = torch_device
        self.seconds: dict[str, float] = {}
        self.prompts = [load_chat(practice_dir()).prompt(text, VARIANTS["solve"]) for text in _ASKED]

    def recipe(self, precision: str, **changes: object) -> Recipe:
        """A recipe for this machine."""
        given: dict[str, object] = {"limits": _LIMITS, "calibration_rows": 16, "gpu": self.gpu, **changes}
        return Recipe(model=PRACTICE, precision=precision, backend="tensorrt-llm", **given)  # type: ignore[arg-type]

    def engine(self, name: str, recipe: Recipe, drafter: Path | None = None) -> Path:
        """The compiled engine called ``name``."""
        out = self.scratch / name
        if not out.exists():
            began = time.monotonic()
            build_trtllm(recipe, out, Sources(drafter=drafter, device=self._torch_device))
            self.seconds[name] = time.monotonic() - began
        return out

    def plain(self) -> Path:
        """The unquantized engine without a drafter, which most items start from."""
        return self.engine("bf16", self.recipe("bf16"))

    def head(self) -> Path:
        """A random draft head: useless for speed, exact all the same."""
        out = self.scratch / "head"
        if not out.exists():
            spec = read_model_spec(practice_dir())
            torch.manual_seed(0)
            config = DrafterConfig(hidden_size=spec.hidden, vocab_size=spec.vocab, exit_dim=2 * spec.hidden)
            out.mkdir()
            save_drafter(Drafter(config), out, dtype=torch.bfloat16)
        return out

    def drafted(self, *, greedy: bool) -> Path:
        """An engine with that head."""
        tree = TreeShape(beams=2, length=3)
        name = "redrafter-greedy" if greedy else "redrafter-sampling"
        return self.engine(name, self.recipe("bf16", tree=tree, greedy=greedy), self.head())

    def torch_tokens(self, recipe: Recipe) -> dict[str, list[int]]:
        """What the torch backend says with the same codes."""
        out = self.scratch / f"torch-{recipe.precision}-{recipe.kv_dtype}"
        if not out.exists():
            native = dataclasses.replace(recipe, backend="torch", tensor_parallel=1, output_layer="model")
            build_native(native, out, device=self._torch_device)
        with open_engine(out, OpenOptions(device=self._torch_device)) as engine:
            return run_requests(engine, self.cold())[0]

    def cold(self, prompts: Sequence[tuple[int, ...]] | None = None) -> list[Request]:
        """Requests at temperature 0."""
        return [self.request(str(i), p, temperature=0.0) for i, p in enumerate(prompts or self.prompts)]

    def request(self, name: str, prompt: tuple[int, ...], *, temperature: float, seed: int = 0) -> Request:
        """One request of the standard length."""
        sampling = SamplingParams(temperature=temperature)
        return Request(id=name, prompt=prompt, sampling=sampling, max_tokens=TOKENS, seed=seed)

    def say(self, directory: Path, requests: Sequence[Request], *, reuse: bool | None = None) -> dict[str, list[int]]:
        """The tokens of a compiled engine."""
        with open_compiled(directory, ExecutorOptions(kv_memory_fraction=0.2, block_reuse=reuse)) as engine:
            return run_requests(engine, requests)[0]


def run_requests(engine: Engine, requests: Sequence[Request]) -> tuple[dict[str, list[int]], dict[str, FinishReason]]:
    """Run requests to their end: tokens and finish by id."""
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    finish: dict[str, FinishReason] = {}
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        for output in engine.step():
            tokens[output.request_id] += output.tokens
            if output.finish is not None:
                finish[output.request_id] = output.finish
    return tokens, finish


def agreement(one: dict[str, list[int]], other: dict[str, list[int]], *, least: float = GOOD) -> str:
    """Share of tokens before the first difference of each sample. Fails when it is low."""
    same = total = 0
    for name, tokens in one.items():
        pairs = zip(tokens, other[name], strict=False)
        same += next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(other[name])))
        total += max(len(tokens), len(other[name]))
    share = same / max(1, total)
    text = f"{share:.0%} of {total} tokens equal"
    if share < POOR:
        raise FailedError(f"{text}: it computes another model")
    if share < least:
        raise FailedError(f"{text}: more than rounding ties explain")
    return text
