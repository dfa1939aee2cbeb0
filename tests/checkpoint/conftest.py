"""Native checkpoints that the TensorRT-LLM tests share, each built once per session."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch

from drafter.checkpoint import save_drafter
from drafter.config import DrafterConfig
from drafter.model import Drafter
from tests.quant.test_calibrate import ROWS
from tests.tiny import save_tiny
from trtkit.checkpoint.convert import convert
from trtkit.checkpoint.hf import EMBEDDING, open_source
from trtkit.decoder import Norms
from trtkit.quant.calibrate import CalibrationOptions, Calibrator, DataFree, LayerScales, LayerwiseCalibrator, Parts
from trtkit.quant.group import GroupScales
from trtkit.scheme import SCHEMES, KvDtype

Native: TypeAlias = Callable[..., Path]

SHAPE: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
    "vocab_size": 320, "num_hidden_layers": 1,
}  # fmt: skip
"""Fits every format at tensor parallel 4, and all but int4 at 8, where KV heads are repeated from 4 on."""
HEADS = {
    "rnn": {"widths": 2, "rnn": True, "layers": 2},
    "rnn+proj": {"widths": 1, "rnn": True, "layers": 2},
    "plain": {"widths": 2, "rnn": False, "layers": 1},
}
"""The variants of a draft head; an exit width other than 2 H needs an input projection."""


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> Native:
    """``native(family, kind, dtype=..., **shape)``: kind is a scheme with ``-rtn`` or ``+fp8``/``+int8`` behind it."""
    made: dict[str, Path] = {}

    def build(family: str, kind: str, *, dtype: torch.dtype = torch.bfloat16, **shape: Any) -> Path:
        source_key = f"{family}-{dtype}-{sorted(shape.items())}"
        if source_key not in made:
            made[source_key] = save_tiny(tmp_path_factory.mktemp("source"), family, dtype=dtype, **{**SHAPE, **shape})
        key = f"{source_key}-{kind}"
        if key not in made:
            made[key] = _quantized(made[source_key], tmp_path_factory.mktemp("native"), kind)
        return made[key]

    return build


class RandomScales:
    """Pre-scales as AWQ would choose them, without its search: a writer does not care where they come from."""

    def layer(self, index: int, norms: Norms, parts: Parts) -> LayerScales:
        """A random scale for every product, shared by its parts."""
        torch.manual_seed(index)
        weights = {name: members[0].weight.data for name, members in parts.items()}
        return LayerScales(
            groups={
                name: GroupScales(pre_scale=torch.empty(weight.shape[1]).uniform_(0.5, 2).to(weight.dtype))
                for name, weight in weights.items()
            },
            kv_amax=None,
        )


def _quantized(source_dir: Path, out: Path, kind: str) -> Path:
    name, _, kv = kind.partition("+")
    awq = not name.endswith("-rtn")
    kv_dtype: KvDtype = "fp8" if kv == "fp8" else "int8" if kv == "int8" else "model"
    scheme = dataclasses.replace(SCHEMES[name.removesuffix("-rtn")], kv_dtype=kv_dtype)
    source = open_source(source_dir)
    calibrator: Calibrator = DataFree()
    if scheme.name == "int4" and awq:
        calibrator = RandomScales()
    elif (scheme.calibrated and awq) or kv == "int8":
        calibrator = LayerwiseCalibrator(
            source.spec, scheme, ROWS, source.shards.tensor(EMBEDDING), options=CalibrationOptions()
        )
    convert(source, out, scheme, calibrator, pre_scale=scheme.name == "int8-sq" or (scheme.name == "int4" and awq))
    return out


@pytest.fixture(scope="session")
def head_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random draft head of every variant for :data:`SHAPE`, and for its double width as ``VARIANT@1024``."""
    made = {}
    for variant, changes in HEADS.items():
        for hidden, name in ((SHAPE["hidden_size"], variant), (2 * SHAPE["hidden_size"], f"{variant}@1024")):
            config = DrafterConfig(
                hidden_size=hidden, vocab_size=SHAPE["vocab_size"], exit_dim=int(changes["widths"] * hidden),
                rnn=bool(changes["rnn"]), num_draft_layers=int(changes["layers"]),
            )  # fmt: skip
            made[name] = tmp_path_factory.mktemp("head")
            save_drafter(Drafter(config), made[name], dtype=torch.bfloat16)
    return made
