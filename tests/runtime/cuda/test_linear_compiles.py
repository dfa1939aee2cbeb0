"""Every tile that can be chosen, compiled for GPUs that are not here: it has to fit, and nothing may spill.

A process of its own, because this one may have loaded Triton as an interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.runtime.cuda.compiling import SHARED_LIMIT
from trtkit.runtime.cuda.choices import BUCKETS, Choice, Gpu, Kind, Shape, candidates

KINDS: tuple[Kind, ...] = ("bf16", "int8", "int8-sq", "fp8", "int4")
ROOT = Path(__file__).parents[3]
# qkv and down of a 14B: candidates differ in their splits, which are no part of the code.
SHAPES = ((7168, 5120), (5120, 13824))


def tiles(kind: Kind, capability: int) -> list[Choice]:
    """The different programs among all candidates."""
    gpu = Gpu(
        sms={89: 58, 90: 132}[capability], capability=divmod(capability, 10), shared_bytes=SHARED_LIMIT[capability]
    )
    found = [
        choice
        for columns, depth in SHAPES
        for bucket in BUCKETS
        for choice in candidates(
            Shape(kind=kind, columns=columns, depth=depth, prepared_input=kind in ("int8-sq", "fp8")), bucket, gpu
        )
        if choice.kernel != "library"
    ]
    return list({json.dumps({**entry(choice), "splits": 1}): choice for choice in found}.values())


def entry(choice: Choice) -> dict[str, object]:
    return {name: getattr(choice, name) for name in Choice.__dataclass_fields__}


def compiled(kind: Kind, capability: int, choices: list[Choice]) -> list[dict[str, int]]:
    """Registers, spilled and shared bytes of each."""
    job = json.dumps([kind, capability, [entry(choice) for choice in choices]])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(["", str(ROOT), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-m", "tests.runtime.cuda.compile_linears"],
        input=job, capture_output=True, text=True, env=environment, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    resources: list[dict[str, int]] = json.loads(done.stdout)
    return resources


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("capability", [89, 90])
@pytest.mark.parametrize("kind", KINDS)
def test_every_candidate_fits(kind: Kind, capability: int) -> None:
    choices = tiles(kind, capability)
    assert len(choices) > 5
    for choice, found in zip(choices, compiled(kind, capability, choices), strict=True):
        assert found["spilled"] == 0, (choice, found)
        assert found["shared"] <= SHARED_LIMIT[capability], (choice, found)
        assert found["waits_first"] or capability < 90, choice


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("capability", [89, 90])
def test_what_engines_launch_compiles(capability: int) -> None:
    """From the arguments of the launches themselves, as Triton sees them there."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(["", str(ROOT), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-m", "tests.runtime.cuda.compile_launches", str(capability)],
        capture_output=True, text=True, env=environment, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(name, error) for name, error in found if error] == []
    assert {name for name, _ in found} >= {"product", "product_words", "attend_split", "combine_splits", "draw"}


@pytest.mark.parametrize("kind", ["int4", pytest.param("fp8", marks=pytest.mark.slow)])
def test_the_first_candidate_compiles(kind: Kind) -> None:
    choices = tiles(kind, 90)[:1]
    (found,) = compiled(kind, 90, choices)
    assert found["spilled"] == 0
    # Loads are 16 bytes wide, ahead of their use, and go past the L1.
    assert found["wide_copies"] > 0
    assert found["narrow_copies"] == 0
    assert found["waits_first"]
