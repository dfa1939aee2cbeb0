"""``QuantScheme``: the precisions as data.

| name    | weights                             | activations            | least capability | quant_algo           |
|---------|-------------------------------------|------------------------|------------------|----------------------|
| bf16    | as they are                         | model dtype            | 8.0              | none                 |
| int8    | int8 per output row, amax/128       | model dtype            | 7.5              | W8A16                |
| int8-sq | int8 per output row, amax/127       | int8, static, smoothed | 7.5              | W8A8_SQ_PER_CHANNEL  |
| fp8     | e4m3 per tensor, amax/448           | e4m3, static           | 8.9              | FP8                  |
| int4    | int4 per 128 inputs of a row, amax/7| model dtype            | 7.5              | W4A16_AWQ            |

``quant_algo`` is TensorRT-LLM's and ModelOpt's name for the format.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from trtkit.errors import ConfigError
from trtkit.files import nearest

__all__ = [
    "SCHEMES",
    "Activations",
    "KvDtype",
    "OutputLayer",
    "Precision",
    "QuantScheme",
    "WeightFormat",
    "scheme_named",
]

Precision: TypeAlias = Literal["bf16", "int8", "int8-sq", "fp8", "int4"]
WeightFormat: TypeAlias = Literal["bf16", "int8", "fp8", "int4"]
Activations: TypeAlias = Literal["none", "int8", "fp8"]
KvDtype: TypeAlias = Literal["model", "fp8", "int8"]
OutputLayer: TypeAlias = Literal["model", "int8"]
"""How lm_head is multiplied: in the model's dtype, or as int8 codes by the rule of the int8 precision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantScheme:
    """One way to store the linears of a model. Embeddings, norms and lm_head are stored in the model's dtype."""

    name: Precision
    weight_format: WeightFormat
    weight_bits: int
    group_size: int | None
    """Inputs that share one scale: 128 for int4; None where a scale spans a whole row or tensor."""
    activations: Activations
    quant_algo: str | None
    min_capability: tuple[int, int]
    """Smallest CUDA compute capability whose tensor cores run this format natively."""
    calibrated: bool
    """Needs activation statistics (int4 only with the awq method)."""
    kv_dtype: KvDtype = "model"

    @property
    def weight_bytes_per_value(self) -> float:
        """Bytes per weight including its share of the group scales (16-bit scales as stored at run time)."""
        scales = 2 / self.group_size if self.group_size else 0.0
        return self.weight_bits / 8 + scales

    @property
    def told(self) -> str:
        """``fp8 (FP8), KV cache model``: with TensorRT-LLM's name, where it has one."""
        return f"{self.name}{f' ({self.quant_algo})' if self.quant_algo else ''}, KV cache {self.kv_dtype}"


SCHEMES: dict[str, QuantScheme] = {
    scheme.name: scheme
    for scheme in (
        QuantScheme(
            name="bf16", weight_format="bf16", weight_bits=16, group_size=None, activations="none",
            quant_algo=None, min_capability=(8, 0), calibrated=False,
        ),
        QuantScheme(
            name="int8", weight_format="int8", weight_bits=8, group_size=None, activations="none",
            quant_algo="W8A16", min_capability=(7, 5), calibrated=False,
        ),
        QuantScheme(
            name="int8-sq", weight_format="int8", weight_bits=8, group_size=None, activations="int8",
            quant_algo="W8A8_SQ_PER_CHANNEL", min_capability=(7, 5), calibrated=True,
        ),
        QuantScheme(
            name="fp8", weight_format="fp8", weight_bits=8, group_size=None, activations="fp8",
            quant_algo="FP8", min_capability=(8, 9), calibrated=True,
        ),
        QuantScheme(
            name="int4", weight_format="int4", weight_bits=4, group_size=128, activations="none",
            quant_algo="W4A16_AWQ", min_capability=(7, 5), calibrated=True,
        ),
    )
}  # fmt: skip


def scheme_named(name: str) -> QuantScheme:
    """The scheme called ``name``; :class:`ConfigError` with the nearest valid name otherwise."""
    if name not in SCHEMES:
        raise ConfigError(f"unknown precision {name!r}{nearest(name, SCHEMES)}", hint=f"one of: {', '.join(SCHEMES)}")
    return SCHEMES[name]
