"""What a TensorRT-LLM checkpoint cannot hold, said before anything is written."""

from __future__ import annotations

from drafter.checkpoint import DrafterError, read_config
from drafter.config import DrafterConfig
from trtkit.checkpoint.names import LINEARS, TrtLinear
from trtkit.checkpoint.trtllm_config import TrtllmOptions, trtllm_dtype
from trtkit.errors import CheckpointError, UnsupportedError
from trtkit.model_spec import Family, ModelSpec
from trtkit.scheme import SCHEMES, QuantScheme

__all__ = ["check_trtllm", "head_config", "linear_shape", "refuse_algo", "trtllm_notes"]

_WEIGHT_ONLY_ALIGNMENT = 64
"""Weight-only layers pad to multiples of this times the ranks, and the loader does not pad our tensors."""
_FP8_ALIGNMENT = 16
"""cuBLASLt's fp8 products, per rank."""


def head_config(options: TrtllmOptions) -> DrafterConfig | None:
    """The configuration of the draft head, if there is one. Raises :class:`CheckpointError` for what is no head."""
    if options.drafter is None:
        return None
    try:
        return read_config(options.drafter)
    except DrafterError as problem:
        raise CheckpointError(str(problem), hint="pass the --out directory of `trtkit train-drafter`") from None


def check_trtllm(spec: ModelSpec, scheme: QuantScheme, options: TrtllmOptions) -> None:
    """Refuse what TensorRT-LLM cannot load or would compute wrongly.

    Raises :class:`UnsupportedError` listing every reason, :class:`CheckpointError` for a drafter that is none.
    """
    head = head_config(options)
    wrong = [refuse_algo(scheme.quant_algo, spec.family)]
    wrong += _rope(spec)
    wrong += _parallel(spec, options)
    if head is not None:
        wrong += _drafter(spec, head, options)
    if not _uneven_heads(spec, options.tensor_parallel):
        wrong += _alignment(spec, scheme, options.tensor_parallel)
    wrong = [text for text in wrong if text]
    if wrong:
        raise UnsupportedError(
            f"TensorRT-LLM cannot hold this model ({scheme.name}, tensor parallel {options.tensor_parallel}, "
            f"pipeline parallel {options.pipeline_parallel})",
            offenders=wrong,
            hint="choose another number of GPUs (`build --gpu l4x2`, `export --tp 2`) or precision, or --backend torch",
        )


def refuse_algo(algo: str | None, family: Family) -> str:
    """Why checkpoints of this ``quant_algo`` are neither written nor read; empty when they are."""
    if algo in {scheme.quant_algo for scheme in SCHEMES.values()}:
        return ""
    text = str(algo)
    if text == "FP8_PER_CHANNEL_PER_TOKEN" or (text.startswith("W8A8_SQ_") and text.endswith("_PLUGIN")):
        if family == "qwen3":
            return f"{text} with Qwen3: its attention class has no q/k norm, it loads and computes another model"
        return f"{text}: not a precision of trtkit"
    if text == "W4A16_GPTQ":
        return "W4A16_GPTQ: its codes are laid out for one GPU architecture; use int4 (W4A16_AWQ) instead"
    return f"quant_algo {text}: not a precision of trtkit"


def _rope(spec: ModelSpec) -> list[str]:
    wrong = []
    if spec.rope.attention_factor is not None:
        wrong.append("yarn with attention_factor: TensorRT-LLM computes its own")
    if not spec.rope.truncate:
        wrong.append("yarn with truncate false: TensorRT-LLM always truncates")
    return wrong


def _uneven_heads(spec: ModelSpec, ranks: int) -> list[str]:
    wrong = []
    if spec.heads % ranks:
        wrong.append(f"{spec.heads} attention heads do not divide by tensor parallel {ranks}")
    if spec.kv_heads % ranks and ranks % spec.kv_heads:
        wrong.append(f"{spec.kv_heads} KV heads can neither be split nor repeated over {ranks} ranks")
    if spec.intermediate % ranks:
        wrong.append(f"intermediate size {spec.intermediate} does not divide by tensor parallel {ranks}")
    return wrong


def _parallel(spec: ModelSpec, options: TrtllmOptions) -> list[str]:
    wrong = _uneven_heads(spec, options.tensor_parallel)
    if spec.layers % options.pipeline_parallel:
        wrong.append(
            f"{spec.layers} layers do not divide by pipeline parallel {options.pipeline_parallel}: "
            "releases deal the rest out differently"
        )
    return wrong


def _drafter(spec: ModelSpec, head: DrafterConfig, options: TrtllmOptions) -> list[str]:
    ranks = options.tensor_parallel
    wrong = [
        f"the draft head's {name} is {theirs}, the model's {ours}"
        for name, theirs, ours in (
            ("hidden size", head.hidden_size, spec.hidden),
            ("vocabulary", head.vocab_size, spec.vocab),
        )
        if theirs != ours
    ]
    if options.pipeline_parallel > 1:
        wrong.append(f"pipeline parallel {options.pipeline_parallel} with a draft head: ReDrafter runs on one stage")
    if spec.vocab % ranks:
        wrong.append(
            f"vocabulary {spec.vocab} does not divide by tensor parallel {ranks}: ReDrafter's beam search would read "
            "the padded logits with the unpadded width"
        )
    wrong += [
        f"the draft head's {name} {size} does not divide by tensor parallel {ranks}"
        for name, size in (("exit_dim", head.exit_dim), ("hidden size", head.hidden_size))
        if size % ranks
    ]
    return wrong


def linear_shape(spec: ModelSpec, linear: TrtLinear, ranks: int) -> tuple[int, int]:
    """(out, in) of a linear on one rank."""
    shapes = [spec.linear_shapes[part] for part in linear.parts]
    if linear.split == "heads":
        kv_heads = max(1, spec.kv_heads // ranks)
        return (spec.heads // ranks + 2 * kv_heads) * spec.head_dim, spec.hidden
    ((rows, width),) = shapes
    return (rows // ranks, width) if linear.split == "rows" else (rows, width // ranks)


def _alignment(spec: ModelSpec, scheme: QuantScheme, ranks: int) -> list[str]:
    wrong = []
    for linear in LINEARS:
        rows, width = linear_shape(spec, linear, ranks)
        if scheme.quant_algo == "FP8":
            step, sizes, where = _FP8_ALIGNMENT, {"outputs": rows, "inputs": width}, " per rank"
        elif scheme.quant_algo in ("W8A16", "W4A16_AWQ"):
            step, where = max(_WEIGHT_ONLY_ALIGNMENT, scheme.group_size or 0) * ranks, ""
            split_rows = linear.split != "columns"
            sizes = {"outputs": rows * (ranks if split_rows else 1), "inputs": width * (1 if split_rows else ranks)}
        else:
            continue
        wrong += [
            f"{linear.name}: {size} {name}{where} are no multiple of {step} ({scheme.name}, tensor parallel {ranks})"
            for name, size in sizes.items()
            if size % step
        ]
    return wrong


def trtllm_notes(spec: ModelSpec, scheme: QuantScheme, options: TrtllmOptions) -> tuple[str, ...]:
    """What is written but works differently than on the torch runtime, or was never run upstream."""
    notes = []
    if spec.dtype != trtllm_dtype(spec, options):
        notes.append(f"{spec.dtype} tensors are written as {trtllm_dtype(spec, options)}")
    if scheme.quant_algo == "W8A16" and options.tensor_parallel > 1:
        notes.append(
            "int8 with tensor parallelism: the loader quantizes each rank's share of o_proj and down_proj anew, so "
            "their codes differ from the torch runtime's; the other linears are the same"
        )
    if scheme.kv_dtype != "model":
        notes.append("keys and values share one cache scale per layer, the larger of the two")
    if scheme.kv_dtype == "fp8" and spec.qkv_bias:
        notes.append("fp8 keys are a known accuracy risk with a qkv bias")
    if options.drafter is not None and spec.family == "qwen3":
        notes.append("ReDrafter on Qwen3: the loader accepts it, upstream has never shipped it")
    if options.drafter is not None and scheme.quant_algo not in (None, "FP8"):
        notes.append(f"ReDrafter on {scheme.name}: the loader accepts it, upstream tests only bf16, fp16 and fp8")
    return tuple(notes)
