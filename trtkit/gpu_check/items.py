"""The experiments. The numbers are those of the checklist in ``docs/tensorrt-llm.md``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from trtkit.build.trtllm import missing_builder_names
from trtkit.gpu_check.lab import POOR, TOKENS, FailedError, Lab, SkippedError, agreement, run_requests
from trtkit.runtime.api import FinishReason
from trtkit.runtime.trtllm_engine import ExecutorOptions, missing_executor_names, open_compiled

__all__ = ["ITEMS"]


def _names(lab: Lab) -> str:
    missing = missing_builder_names() + missing_executor_names()
    if missing:
        raise FailedError("; ".join(missing))
    return "every name and keyword argument that trtkit uses is there"


def _precision(name: str) -> Callable[[Lab], str]:
    def run(lab: Lab) -> str:
        recipe = lab.recipe(name)
        text = agreement(lab.torch_tokens(recipe), lab.say(lab.engine(name, recipe), lab.cold()))
        return f"{text} to the torch backend; built in {lab.seconds[name]:.0f} s"

    return run


def _kv(kv_dtype: str) -> Callable[[Lab], str]:
    def run(lab: Lab) -> str:
        recipe = lab.recipe("fp8" if kv_dtype == "fp8" else "int8", kv_dtype=kv_dtype)
        said = lab.say(lab.engine(f"kv-{kv_dtype}", recipe), lab.cold())
        # Keys and values share a scale in TensorRT-LLM and have their own in the torch backend.
        return agreement(lab.torch_tokens(recipe), said, least=POOR) + " to the torch backend"

    return run


def _stops(lab: Lab) -> str:
    said = lab.say(lab.plain(), lab.cold(lab.prompts[:1]))["0"]
    stop = said[5]
    request = dataclasses.replace(lab.cold(lab.prompts[:1])[0], stop_ids=(stop,))
    with open_compiled(lab.plain(), ExecutorOptions(kv_memory_fraction=0.2)) as engine:
        tokens, finish = run_requests(engine, [request])
    wanted = said[: said.index(stop) + 1]
    if tokens["0"] != wanted or finish["0"] is not FinishReason.STOP:
        raise FailedError(f"asked to stop at {stop}: {tokens['0']} ({finish['0']}), expected {wanted}")
    return "a stop id ends the sample and is its last token"


def _cancel(lab: Lab) -> str:
    with open_compiled(lab.plain(), ExecutorOptions(kv_memory_fraction=0.2)) as engine:
        for request in lab.cold():
            engine.submit(request)
        engine.step()
        engine.cancel("0")
        left = [output for _ in range(10_000) if engine.has_work for output in engine.step()]
        if engine.has_work:
            raise FailedError("the other requests did not end")
        again = run_requests(engine, lab.cold(lab.prompts[:1]))[0]["0"]
    ends = [output.finish for output in left if output.request_id == "0" and output.finish]
    if ends != [FinishReason.CANCELLED] or len(again) != TOKENS:
        raise FailedError(f"cancelled request ended as {ends}; afterwards {len(again)} tokens came")
    return "a cancelled request ends once, the others go on"


def _seeds(lab: Lab) -> str:
    hot = [lab.request(f"{seed}/{i}", lab.prompts[0], temperature=3.0, seed=seed) for seed in (1, 2) for i in range(2)]
    said = lab.say(lab.plain(), hot)
    if said["1/0"] == said["2/0"]:
        raise FailedError("two seeds gave the same sample at temperature 3")
    alike = "the same sample" if said["1/0"] == said["1/1"] else "DIFFERENT samples"
    return f"other seeds give other samples; the same seed gives {alike} in one batch"


def _extend(lab: Lab) -> str:
    first, *_ = lab.cold(lab.prompts[:1])
    with open_compiled(lab.plain(), ExecutorOptions(kv_memory_fraction=0.2)) as engine:
        held = dataclasses.replace(first, hold=True, max_tokens=TOKENS // 2)
        said = run_requests(engine, [held])[0]["0"]
        engine.extend("0", (), max_tokens=TOKENS - len(said))
        while engine.has_work:
            said += [token for output in engine.step() for token in output.tokens]
    return agreement(lab.say(lab.plain(), [first]), {"0": said}) + " when an answer is interrupted and continued"


def _reuse(lab: Lab) -> str:
    requests = lab.cold([lab.prompts[0]] * 8)
    return agreement(lab.say(lab.plain(), requests, reuse=False), lab.say(lab.plain(), requests, reuse=True))


def _drafted(lab: Lab) -> str:
    return agreement(lab.say(lab.plain(), lab.cold()), lab.say(lab.drafted(greedy=True), lab.cold()))


def _drafted_reuse(lab: Lab) -> str:
    requests, engine = lab.cold([lab.prompts[0]] * 8), lab.drafted(greedy=True)
    return agreement(lab.say(engine, requests, reuse=False), lab.say(engine, requests, reuse=True))


def _drafted_sampling(lab: Lab) -> str:
    engine = lab.drafted(greedy=False)
    hot = [lab.request(str(seed), lab.prompts[seed % 4], temperature=1.0, seed=seed) for seed in range(32)]
    said = lab.say(engine, hot)
    stray = sum(tokens.count(0) for tokens in said.values())
    total = sum(map(len, said.values()))
    usual = sum(tokens.count(0) for tokens in lab.say(lab.plain(), hot).values())
    if stray > usual + total / 100:
        raise FailedError(f"token id 0 came {stray} times in {total} (plain engine: {usual}): a broken sampler")
    return f"token id 0 came {stray} times in {total}, {usual} times without a drafter"


def _ranks(lab: Lab) -> str:
    if lab.devices < 2:
        raise SkippedError("needs two GPUs")
    recipe = lab.recipe("bf16", gpu=f"{lab.gpu}x2", tensor_parallel=2)
    return agreement(lab.say(lab.plain(), lab.cold()), lab.say(lab.engine("two-ranks", recipe), lab.cold()))


ITEMS: tuple[tuple[str, Callable[[Lab], str]], ...] = (
    ("names", _names),
    ("bf16 engine", _precision("bf16")),
    ("int8 engine", _precision("int8")),
    ("int8-sq engine", _precision("int8-sq")),
    ("fp8 engine", _precision("fp8")),
    ("int4 engine", _precision("int4")),
    ("fp8 KV cache", _kv("fp8")),
    ("int8 KV cache", _kv("int8")),
    ("stop ids", _stops),
    ("cancel", _cancel),
    ("seeds", _seeds),
    ("continuing a sample", _extend),
    ("KV block reuse", _reuse),
    ("ReDrafter, greedy", _drafted),
    ("ReDrafter with block reuse", _drafted_reuse),
    ("ReDrafter, sampling", _drafted_sampling),
    ("two ranks", _ranks),
)
"""Name and experiment; the number of an item in the checklist is its place here + 2 (1 is the machine itself)."""
