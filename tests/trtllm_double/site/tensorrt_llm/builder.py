"""``BuildConfig`` and ``build``. Where the real builder would change a setting with a warning, this one raises."""

import copy
import json
import os
import shutil
from pathlib import Path

from tensorrt_llm import __version__
from tensorrt_llm._strict import Strict
from tensorrt_llm.models.modeling_utils import SpeculativeDecodingMode
from tensorrt_llm.plugin import PluginConfig


class BuildConfig(Strict):
    max_input_len: int = 1024
    max_seq_len: (int, None) = None
    opt_batch_size: int = 8
    max_batch_size: int = 2048
    max_beam_width: int = 1
    max_num_tokens: int = 8192
    opt_num_tokens: (int, None) = None
    gather_context_logits: bool = False
    gather_generation_logits: bool = False
    strongly_typed: bool = True
    profiling_verbosity: str = "layer_names_only"
    max_draft_len: int = 0
    speculative_decoding_mode: SpeculativeDecodingMode = SpeculativeDecodingMode.NONE
    input_timing_cache: (str, None) = None
    output_timing_cache: (str, None) = "model.cache"
    weight_streaming: bool = False
    plugin_config: (PluginConfig, None) = None
    dry_run: bool = False


class Engine:
    def __init__(self, model, config):
        self.model = model
        self.config = config

    def save(self, engine_dir):
        if not isinstance(engine_dir, str):
            raise TypeError("engine_dir: a string")
        out = Path(engine_dir)
        out.mkdir(parents=True, exist_ok=True)
        if self.model.config.rank == 0:
            build = {name: getattr(self.config, name) for name in self.config.fields()}
            build["plugin_config"] = self.config.plugin_config.to_dict()
            build["speculative_decoding_mode"] = int(self.config.speculative_decoding_mode)
            whole = {"version": __version__, "pretrained_config": self.model.config.values, "build_config": build}
            (out / "config.json").write_text(json.dumps(whole), encoding="utf-8")
        shutil.copyfile(self.model.rank_file, out / f"rank{self.model.config.rank}.engine")


def build(model, build_config):
    if not isinstance(build_config, BuildConfig) or build_config.plugin_config is None:
        raise TypeError("build(model, build_config: BuildConfig with a PluginConfig)")
    config = copy.deepcopy(build_config)
    _would_override(model.config.values, config)
    _draft(model.config.values, config)
    if config.output_timing_cache is not None and model.config.rank == 0:
        if config.input_timing_cache is not None:
            Path(config.input_timing_cache).read_bytes()
        Path(config.output_timing_cache).write_bytes(b"timings")
    return Engine(model, config)


def _would_override(model, config):
    plugins, sm = config.plugin_config, int(os.environ["TRTLLM_DOUBLE_SM"])
    algo = model["quantization"]["quant_algo"]
    kv = model["quantization"]["kv_cache_quant_algo"]
    complaints = {
        "max_seq_len is needed": config.max_seq_len is None,
        "max_input_len exceeds max_seq_len": config.max_seq_len is not None
        and config.max_input_len > config.max_seq_len,
        "max_num_tokens exceeds max_batch_size * max_seq_len": config.max_num_tokens
        > config.max_batch_size * (config.max_seq_len or 0),
        "max_seq_len exceeds the model's positions": (config.max_seq_len or 0) > model["max_position_embeddings"],
        "fp8 context FMHA needs fp8 weights": plugins.use_fp8_context_fmha and algo != "FP8",
        "fp8 context FMHA needs SM 89": plugins.use_fp8_context_fmha and sm < 89,
        "fp8 paged context FMHA needs an fp8 KV cache": plugins.use_fp8_context_fmha
        and plugins.use_paged_context_fmha
        and kv != "FP8",
        "paged context FMHA and an fp8 KV cache need fp8 context FMHA": plugins.use_paged_context_fmha
        and kv == "FP8"
        and not plugins.use_fp8_context_fmha,
        "paged context FMHA does not work with an int8 KV cache": plugins.use_paged_context_fmha and kv == "INT8",
        "the fused MLP cannot hold these weights": plugins.use_fused_mlp and algo not in (None, "FP8"),
        "gemm_swiglu is for fp8 on SM 90": plugins.gemm_swiglu_plugin is not None and (algo != "FP8" or sm != 90),
        "gemm_swiglu needs the fused MLP": plugins.gemm_swiglu_plugin is not None and not plugins.use_fused_mlp,
        "the fp8 GEMM plugin needs fp8 weights": plugins.gemm_plugin == "fp8" and algo != "FP8",
        "INT8/INT4 quantization is not supported on SM>=100": 100 <= sm < 120 and algo not in (None, "FP8"),
        "only paged KV caches": plugins.paged_kv_cache is False,
    }
    said = [text for text, wrong in complaints.items() if wrong]
    if said:
        raise RuntimeError("; ".join(said))


def _draft(model, config):
    if not model["architecture"].startswith("ReDrafter"):
        if config.max_draft_len or config.speculative_decoding_mode != SpeculativeDecodingMode.NONE:
            raise RuntimeError("speculative decoding without a draft head")
        return
    length = model["redrafter_num_beams"] * model["redrafter_draft_len_per_beam"]
    if config.max_draft_len != length or config.max_beam_width != 1:
        raise RuntimeError(f"max_draft_len {config.max_draft_len}: the head draws {length}")
    if config.speculative_decoding_mode != SpeculativeDecodingMode.EXPLICIT_DRAFT_TOKENS:
        raise RuntimeError("speculative_decoding_mode is not EXPLICIT_DRAFT_TOKENS for ReDrafter model")
    if config.max_num_tokens < config.max_batch_size * (length + 1):
        raise RuntimeError("max_num_tokens is smaller than max_batch_size * (max_draft_len + 1)")
    config.max_seq_len += length
