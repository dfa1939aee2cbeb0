"""Names, dtypes and shapes in the rank files of a TensorRT-LLM checkpoint, for the writer and the reader."""

from __future__ import annotations

import math

import torch

from drafter.config import DrafterConfig
from trtkit.checkpoint.hf import MODEL_DTYPES
from trtkit.checkpoint.names import (
    KV_SCALE,
    LINEARS,
    TABLES,
    TENSORS,
    drafter_tensors,
    layer_norms,
    stored_tensors,
    trt_layer_prefix,
)
from trtkit.checkpoint.shards import Layout
from trtkit.checkpoint.trtllm_check import linear_shape
from trtkit.checkpoint.trtllm_config import TrtllmOptions, trtllm_dtype
from trtkit.model_spec import ModelSpec
from trtkit.scheme import QuantScheme

__all__ = ["EMBEDDING_TABLE", "FINAL_NORM_TABLE", "LM_HEAD_TABLE", "padded_vocab", "rank_layout"]

EMBEDDING_TABLE, FINAL_NORM_TABLE, LM_HEAD_TABLE = TABLES


def rank_layout(
    spec: ModelSpec, scheme: QuantScheme, options: TrtllmOptions, head: DrafterConfig | None, *, stage: int,
    pre_scale: bool,
) -> Layout:  # fmt: skip
    """Every tensor of a rank file of pipeline stage ``stage`` with dtype and shape, in file order."""
    model = MODEL_DTYPES[trtllm_dtype(spec, options)]
    ranks, stages = options.tensor_parallel, options.pipeline_parallel
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    if stage == 0:
        layout[EMBEDDING_TABLE] = (model, (spec.vocab, spec.hidden))
    for index in range(spec.layers // stages):
        prefix = trt_layer_prefix(index)
        layout |= {f"{prefix}{name}": (model, (length,)) for name, (_, length) in layer_norms(spec).items()}
        for linear in LINEARS:
            shape = linear_shape(spec, linear, ranks)
            bias = spec.qkv_bias and linear.product == "qkv"
            for tensor in stored_tensors(scheme, bias=bias, pre_scale=pre_scale):
                layout[f"{prefix}{linear.name}.{TENSORS[tensor]}"] = _stored(tensor, shape, scheme, model)
        if scheme.kv_dtype != "model":
            layout[f"{prefix}{KV_SCALE}"] = (torch.float32, (1,))
    if stage == stages - 1:
        layout[FINAL_NORM_TABLE] = (model, (spec.hidden,))
        layout[LM_HEAD_TABLE] = (model, (padded_vocab(spec.vocab, ranks) // ranks, spec.hidden))
    if head is not None:
        for name, (_, (rows, *rest)) in drafter_tensors(head).items():
            layout[name] = (model, (rows // ranks, *rest))
    return layout


def _stored(
    tensor: str, shape: tuple[int, int], scheme: QuantScheme, model: torch.dtype
) -> tuple[torch.dtype, tuple[int, ...]]:
    rows, width = shape
    if tensor == "bias":
        return model, (rows,)
    if tensor == "pre_quant_scale":
        return model, (width,)
    if tensor == "input_scale":
        return torch.float32, (1,)
    if tensor == "weight_scale":
        scales = {"int8": (rows,), "fp8": (1,), "int4": (rows, math.ceil(width / (scheme.group_size or width)))}
        return torch.float32, scales[scheme.weight_format]
    if scheme.weight_format == "int4":
        return torch.int8, (rows // 2, width)
    codes = {"W8A8_SQ_PER_CHANNEL": torch.int8, "FP8": torch.float8_e4m3fn}
    return codes.get(scheme.quant_algo or "", model), shape


def padded_vocab(vocab: int, ranks: int) -> int:
    """Rows of lm_head over all ranks."""
    return -(-vocab // ranks) * ranks
