"""``PluginConfig``: until it became a pydantic model it took no keyword arguments, so it takes none here."""

import os

from tensorrt_llm._strict import Strict

_DTYPES = ("auto", "float16", "float32", "bfloat16", "int32", None)
_CHOICES = {
    "gemm_plugin": (*_DTYPES, "fp8", "nvfp4"),
    "gemm_swiglu_plugin": ("fp8", None),
    "low_latency_gemm_plugin": ("fp8", None),
    "low_latency_gemm_swiglu_plugin": ("fp8", None),
    "gemm_allreduce_plugin": ("float16", "bfloat16", None),
}


class PluginConfig(Strict):
    gpt_attention_plugin: (str, None) = "auto"
    bert_attention_plugin: (str, None) = "auto"
    nccl_plugin: (str, None) = "auto"
    moe_plugin: (str, None) = "auto"
    mamba_conv1d_plugin: (str, None) = "auto"
    gemm_plugin: (str, None) = None
    gemm_swiglu_plugin: (str, None) = None
    low_latency_gemm_plugin: (str, None) = None
    low_latency_gemm_swiglu_plugin: (str, None) = None
    gemm_allreduce_plugin: (str, None) = None
    context_fmha: bool = True
    remove_input_padding: bool = True
    paged_state: bool = True
    smooth_quant_plugins: bool = True
    use_paged_context_fmha: bool = True
    use_fp8_context_fmha: bool = True
    use_fused_mlp: bool = True
    tokens_per_block: int = 32
    reduce_fusion: bool = False
    user_buffer: bool = False
    norm_quant_fusion: bool = False
    multiple_profiles: bool = False
    streamingllm: bool = False
    manage_weights: bool = False
    fuse_fp4_quant: bool = False
    pp_reduce_scatter: bool = False
    paged_kv_cache: (bool, None) = None

    def __init__(self):
        super().__init__()

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name.endswith("_plugin") and value not in _CHOICES.get(name, _DTYPES):
            raise ValueError(f"Plugin {name} expects values in {_CHOICES.get(name, _DTYPES)}, got {value}")

    def validate(self):
        if os.environ["TRTLLM_DOUBLE_SM"] == "100" and self.gemm_swiglu_plugin is not None:
            raise NotImplementedError("gemm_swiglu_plugin=fp8 is not supported on SM 100.")

    def to_dict(self):
        return {name: getattr(self, name) for name in self.fields()}
