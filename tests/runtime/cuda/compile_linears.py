"""Compile linears: a job on stdin (kind, capability, choices), the resources of each choice on stdout. Needs no GPU."""

from __future__ import annotations

import json
import sys
from typing import Any

from tests.runtime.cuda.compiling import Resources, compile_for
from trtkit.runtime.cuda.choices import Choice, Kind
from trtkit.runtime.cuda.products import one_row, product, product_words

POINTERS = {
    "scale_ptr": "*fp32", "bias_ptr": "*fp32", "pre_ptr": "*bf16", "inverse_ptr": "*fp32", "ratio_ptr": "*fp16",
    "out_ptr": "*bf16", "partial_ptr": "*fp32", "arrived_ptr": "*i32",
}  # fmt: skip
NUMBERS = dict.fromkeys(("M", "N", "K", "WIDTH", "steps", "splits"), "i32")
WEIGHTS = {"bf16": "*bf16", "int8": "*i16", "int4": "*i16", "int8-sq": "*i8", "fp8": "*fp8e4nv"}


def build(kind: Kind, capability: int, choice: Choice) -> Resources:
    """The kernel of a choice, for inputs that fill its steps."""
    codes = kind in ("int8-sq", "fp8")
    constants: dict[str, Any] = {"COLUMNS": choice.columns, "EVEN": True, "PRE": choice.fused and kind != "fp8"}
    constants["early"] = capability >= 90
    if choice.kernel == "one_row":
        kernel, constants["DEPTH"] = one_row, choice.depth
    else:
        constants |= {"ROWS": choice.rows, "SWAP": choice.swap}
        kernel = product_words if kind in ("int8", "int4") else product
    if kernel is product_words:
        constants["BITS"] = int(kind[3:])
    elif kernel is product:
        constants |= {"DEPTH": choice.depth, "QUANTIZE": codes and choice.fused}
    x = WEIGHTS[kind] if codes and not choice.fused else "*bf16"
    types = {**POINTERS, **NUMBERS, "x_ptr": x, "w_ptr": WEIGHTS[kind]}
    used = {name: types[name] for name in kernel.arg_names if name not in constants}
    return compile_for(capability, kernel, used, constants, warps=choice.warps, stages=choice.stages)


def _waits_first(ptx: str) -> bool:
    """Whether nothing is loaded or stored before the kernel's predecessor is done; prefetched is."""
    before, wait, after = ptx.partition("griddepcontrol.wait")
    touched = ("ld.global", "st.global", "cp.async", "atom.global", "red.global")
    return bool(wait) and not any(word in before for word in touched) and "griddepcontrol.launch_dependents" in after


def main() -> None:
    kind, capability, entries = json.load(sys.stdin)
    answers = []
    for entry in entries:
        found = build(kind, capability, Choice(**entry))
        answers.append(
            {
                "registers": found.registers,
                "spilled": found.spilled_bytes,
                "shared": found.shared_bytes,
                "wide_copies": found.ptx.count("cp.async.cg.shared.global ["),
                "narrow_copies": found.ptx.count("cp.async.ca"),
                "waits_first": _waits_first(found.ptx),
            }
        )
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
