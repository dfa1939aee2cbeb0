"""The kernels of the pick as Triton's compiler makes them for GPUs that are not there.

Compiled in a process of its own: in this one the kernels are the interpreter's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from trtkit.runtime.cuda import sampling

TYPES = {
    **dict.fromkeys(("sums", "floors", "counters", "decisions", "top_k", "seeds", "positions", "out"), "*i64"),
    **dict.fromkeys(("peaks", "temperature", "top_p", "min_p"), "*fp32"),
    **dict.fromkeys(("stride", "width", "chunks", "rows", "passed"), "i32"),
    "logits": "*bf16", "first": "*i32", "cold": "*i1",
}
for name, constants in json.load(sys.stdin):
    kernel = getattr(sampling, name)
    constants = {"chunk": sampling._CHUNK, "tile": 64, "passes": 5, "last": 1, "count": False, **constants}
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    signature = {name: "constexpr" if name in constants else TYPES[name] for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    print(json.dumps([name, triton.compile(source, target=target, options=sampling._LAUNCH).asm["ptx"]]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_nothing_is_fused_or_flushed(capability: int) -> None:
    """Each float32 operation of a weight is rounded once, to nearest, as in torch; subnormal numbers stay."""
    kernels = [
        ("peak", {}), ("narrow", {}), ("narrow", {"count": True}), ("weigh", {"cut": 0}), ("weigh", {"cut": 2}),
        ("draw", {}),
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(capability)], input=json.dumps(kernels), env=environment, cwd=ROOT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    made = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(made) == len(kernels)
    for name, ptx in made:
        assert not [word for word in ("fma.", "mad.rn", ".ftz", ".approx", "div.full") if word in ptx], name
        if name != "peak":
            assert "div.rn.f32" in ptx
            assert ("mul.f32" in ptx, "add.f32" in ptx) == (False, False), "with .rn, so that ptxas fuses nothing"
