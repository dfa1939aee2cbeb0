"""What TensorRT-LLM is asked to build, as data: a recipe and a model become the arguments of ``trtllm-build``. Pure.

Three limits are not what they seem:

- A prompt may be as long as the whole: an answer that is continued (``Engine.extend``) comes back as a prompt. With
  packed input ``max_input_len`` is ignored and ``max_num_tokens`` decides, unless the runtime can chunk long prompts.
- Chunked context and KV block reuse both need paged context FMHA, which an int8 KV cache excludes, and an fp8 KV cache
  too unless the weights are fp8. Nobody has shown chunked context with a ReDrafter, so it is not used there.
- The builder adds the draft tokens to ``max_seq_len`` by itself, and ReDrafter verifies a whole tree per row in one
  step: ``max_num_tokens`` must hold batch x (1 + beams x length). It may not exceed batch x ``max_seq_len``, to which
  the builder cuts it down (``check_max_num_tokens`` in ``tensorrt_llm/_common.py``).
"""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from typing import Literal

from trtkit.errors import UnsupportedError
from trtkit.gpu import GpuProfile, capability_text, profile_named
from trtkit.model_spec import ModelSpec
from trtkit.plan.refusals import device_refusals
from trtkit.recipe import Recipe
from trtkit.scheme import SCHEMES

__all__ = [
    "CONTAINERS",
    "WINDOW",
    "WINDOW_TEXT",
    "BuildPlan",
    "PluginPlan",
    "build_flags",
    "check_gpu",
    "command_line",
    "container_line",
    "plan_build",
]

WINDOW = ((1, 0), (1, 3))
"""First release with ReDrafter for Qwen; first one without the TensorRT backend."""
WINDOW_TEXT = ">=1.0,<1.3"
CONTAINERS = {
    "1.0": "nvcr.io/nvidia/tensorrt-llm/release:1.0.0",
    "1.1": "nvcr.io/nvidia/tensorrt-llm/release:1.1.0",
    "1.2": "nvcr.io/nvidia/tensorrt-llm/release:1.2.1",
}
"""Public NGC images by release. 1.0 has CUDA 12.9, the others CUDA 13."""
_CHUNK_TOKENS = 8192
"""trtllm-build's own default of ``max_num_tokens``: the largest part of a prompt computed at once."""
_ADA, _HOPPER = (8, 9), (9, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginPlan:
    """The fields of ``PluginConfig`` that we decide; the builder sets the others from the checkpoint."""

    gemm_plugin: Literal["auto", "fp8"]
    """For GEMMs that are not weight-only quantized: ``auto`` is the model's dtype."""
    gemm_swiglu_plugin: Literal["fp8"] | None
    """gate, up and silu in one kernel: fp8 weights on Hopper (compute capability 9.0) only."""
    use_paged_context_fmha: bool
    use_fp8_context_fmha: bool
    """Only with fp8 weights and an fp8 KV cache: beside paged context FMHA the builder accepts it nowhere else."""
    use_fused_mlp: bool
    """Only unquantized and fp8 weights can be fused."""
    paged_kv_cache: bool = True
    remove_input_padding: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildPlan:
    """The fields of ``BuildConfig`` that we decide."""

    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    """Without the draft tokens, which the builder adds."""
    max_num_tokens: int
    max_draft_len: int
    """beams x length; 0 without a drafter."""
    plugins: PluginPlan
    tensor_parallel: int
    max_beam_width: int = 1

    @property
    def redrafter(self) -> bool:
        """Speculative decoding mode ``explicit_draft_tokens``."""
        return self.max_draft_len > 0


def plan_build(recipe: Recipe, spec: ModelSpec) -> BuildPlan:
    """The build that ``recipe`` asks for; like the torch runtime it ends at the model's last position.

    A draft tree ends there, too: the engine's table of rotations has no more rows, and the kernel that reads it checks
    nothing (``applyBiasRopeUpdateKVCacheV2`` in kernels/unfusedAttentionKernels_2_template.h).
    """
    weights_fp8 = SCHEMES[recipe.precision].activations == "fp8"
    capability = profile_named(recipe.gpu).capability or (0, 0)
    paged = recipe.kv_dtype == "model" or (recipe.kv_dtype == "fp8" and weights_fp8)
    limits, tree = recipe.limits, recipe.tree
    nodes = 1 if tree is None else tree.max_nodes
    whole_prompts = tree is not None or not paged
    total = min(limits.total_tokens, spec.max_positions - (0 if tree is None else tree.length))
    chunk = max(_CHUNK_TOKENS, min(limits.prompt_tokens, total))
    context = total if whole_prompts else min(chunk, limits.batch * total)
    fused = weights_fp8 or recipe.precision == "bf16"
    return BuildPlan(
        max_batch_size=limits.batch,
        max_input_len=total,
        max_seq_len=total,
        max_num_tokens=max(context, limits.batch * nodes),
        max_draft_len=nodes - 1,
        tensor_parallel=recipe.tensor_parallel,
        plugins=PluginPlan(
            gemm_plugin="fp8" if weights_fp8 else "auto",
            gemm_swiglu_plugin="fp8" if weights_fp8 and capability == _HOPPER else None,
            use_paged_context_fmha=paged,
            use_fp8_context_fmha=weights_fp8 and recipe.kv_dtype == "fp8" and capability >= _ADA,
            use_fused_mlp=fused,
        ),
    )


def check_gpu(recipe: Recipe) -> None:
    """Refuse what TensorRT-LLM cannot build for the recipe's GPU: :class:`UnsupportedError` listing every reason."""
    gpu, scheme = profile_named(recipe.gpu), SCHEMES[recipe.precision]
    if gpu.is_cpu:
        raise UnsupportedError(
            "a TensorRT engine is built for one kind of GPU, and none was named",
            hint="name it with --gpu, e.g. --gpu l4x4 or --gpu h100",
        )
    wrong = device_refusals(scheme, gpu, recipe.kv_dtype, drafter=recipe.tree is not None)
    if wrong:
        raise UnsupportedError(
            f"TensorRT-LLM cannot build this for {gpu.title} (compute capability {capability_text(gpu.capability)})",
            offenders=wrong,
            hint=f"{_alternatives(gpu)}, or use --backend torch",
        )


def _alternatives(gpu: GpuProfile) -> str:
    able = [scheme.name for scheme in SCHEMES.values() if not device_refusals(scheme, gpu, "model", drafter=False)]
    return f"it runs: {', '.join(able)}, with --kv-dtype model" if able else "choose another GPU"


def build_flags(plan: BuildPlan) -> dict[str, str]:
    """The options of ``trtllm-build`` that say the same, in the order of its help."""
    flags = {
        name: str(getattr(plan, name))
        for name in ("max_batch_size", "max_input_len", "max_seq_len", "max_beam_width", "max_num_tokens")
    }
    flags["kv_cache_type"] = "paged"
    if plan.redrafter:
        flags["speculative_decoding_mode"] = "explicit_draft_tokens"
    for field in dataclasses.fields(plan.plugins):
        value = getattr(plan.plugins, field.name)
        if field.name == "paged_kv_cache":
            continue  # deprecated on the command line in favour of kv_cache_type
        flags[field.name] = {True: "enable", False: "disable", None: "disable"}.get(value, str(value))
    return flags


def command_line(plan: BuildPlan, *, checkpoint: str, out: str) -> str:
    """The equivalent ``trtllm-build`` line. The draft length is in the checkpoint, so it is no option here."""
    flags = {"checkpoint_dir": checkpoint, "output_dir": out, **build_flags(plan)}
    if plan.tensor_parallel > 1:
        flags["workers"] = str(plan.tensor_parallel)
    return " ".join(["trtllm-build", *(f"--{name} {shlex.quote(value)}" for name, value in flags.items())])


def container_line(inside: str, *, release: str = "1.0") -> str:
    """A ``docker run`` line that runs ``inside`` in NVIDIA's public image, the current directory mounted."""
    return (
        "docker run --rm -it --gpus all --ipc host --ulimit memlock=-1 --ulimit stack=67108864 "
        f'-v "$PWD":/mnt -w /mnt {CONTAINERS[release]} bash -c {shlex.quote(inside)}'
    )
