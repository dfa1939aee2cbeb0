"""The checkpoint loader of the double: stricter than the real one, which only warns about extra tensors and dtypes.

It knows nothing of trtkit. Its law is ``tests/golden/trtllm_tensors.json``, written down from the format's rules.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

LAW: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden" / "trtllm_tensors.json").read_text())
_TYPES = {"str": str, "int": int, "float": (int, float), "bool": bool, "dict": dict}
_NO_QK_NORM = ("FP8_PER_CHANNEL_PER_TOKEN",)


class LoadError(Exception):
    """What the loader refuses; one line per problem."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedCheckpoint:
    """A checkpoint that loaded without a complaint."""

    directory: Path
    config: dict[str, Any]
    """config.json as it stands."""
    ranks: tuple[dict[str, Tensor], ...]
    """Tensors of every rank by name; rank = pipeline stage x tp + tensor-parallel rank."""

    @property
    def tensor_parallel(self) -> int:
        return int(self.config["mapping"]["tp_size"])

    @property
    def pipeline_parallel(self) -> int:
        return int(self.config["mapping"]["pp_size"])

    @property
    def redrafter(self) -> bool:
        """Whether a draft head is in the rank files."""
        return str(self.config["architecture"]).startswith("ReDrafter")

    def weight(self, rank: int, linear: str) -> Tensor:
        """The float32 matrix that an engine computes with, prequant included: ``transformer.layers.0.mlp.fc``."""
        tensors = self.ranks[rank]
        stored, scale = tensors[f"{linear}.weight"], tensors.get(f"{linear}.weights_scaling_factor")
        algo = self.config["quantization"]["quant_algo"]
        if algo == "W8A16":
            codes, scale = weight_only_codes(stored)
            made = codes.float() * scale[:, None]
        elif algo == "W4A16_AWQ":
            low, high = ((stored.int() & 15) ^ 8) - 8, (((stored.int() >> 4) & 15) ^ 8) - 8
            assert scale is not None
            made = torch.stack([low, high], dim=1).reshape(-1, stored.shape[1]).float()
            held = scale.to(getattr(torch, self.config["dtype"])).float()
            made = made * held.repeat_interleave(128, dim=1)
        elif algo == "W8A8_SQ_PER_CHANNEL":
            assert scale is not None
            made = stored.float() * scale[:, None]
        else:
            made = stored.float() if scale is None else stored.float() * scale
        prequant = tensors.get(f"{linear}.prequant_scaling_factor")
        return made if prequant is None else made * prequant.float()


def weight_only_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """What the loader makes of a W8A16 weight: int8 codes, and the scales as stored, in float32.

    amax and division in float32, C's round (half away from zero), clipped; the stored scale is rounded to the dtype.
    """
    wide = weight.float()
    scale = wide.abs().amax(dim=1) / 128
    steps = torch.where(scale[:, None] > 0, wide / scale[:, None], torch.zeros(()))
    codes = (steps.abs() + 0.5).floor() * steps.sign()
    return codes.clamp(-128, 127).to(torch.int8), scale.to(weight.dtype).float()


def rotations(config: Mapping[str, Any]) -> tuple[Tensor, float]:
    """The speeds (D / 2,) of the engine's table of rotations and the factor on its cosines and sines, in float64.

    After ``RopeEmbeddingUtils`` and ``Attention.create_attention_const_params``.
    """
    size, base = config["head_size"], config["rotary_base"]
    speeds = base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    scaling = config.get("rotary_scaling")
    if scaling is None:
        return speeds, 1.0
    factor, context = scaling["factor"], scaling["original_max_position_embeddings"]
    if scaling["type"] == "llama3":
        wave = 2 * math.pi / speeds
        longest, shortest = context / scaling["low_freq_factor"], context / scaling["high_freq_factor"]
        smooth = (context / wave - scaling["low_freq_factor"]) / (
            scaling["high_freq_factor"] - scaling["low_freq_factor"]
        )
        between = (1 - smooth) * speeds / factor + smooth * speeds
        return torch.where(wave < shortest, speeds, torch.where(wave > longest, speeds / factor, between)), 1.0

    def dimension(turns: float) -> float:
        return float(size * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base)))

    first = max(0, math.floor(dimension(scaling["beta_fast"])))
    last = min(size - 1, math.ceil(dimension(scaling["beta_slow"])))
    slowed = ((torch.arange(size // 2, dtype=torch.float64) - first) / max(last - first, 0.001)).clamp(0, 1)
    return speeds * (1 - slowed) + speeds / factor * slowed, 0.1 * math.log(factor) + 1


def load_checkpoint(directory: Path) -> LoadedCheckpoint:
    """Load config.json and all rank files; raises :class:`LoadError` with every problem."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    problems = list(_config_problems(config))
    if problems:
        raise LoadError(problems)
    world = config["mapping"]["world_size"]
    names = {f"rank{rank}.safetensors" for rank in range(world)}
    found = {path.name for path in directory.glob("*.safetensors")}
    problems += [f"{name}: missing" for name in sorted(names - found)]
    problems += [f"{name}: not a rank of this checkpoint" for name in sorted(found - names)]
    if problems:
        raise LoadError(problems)
    ranks = tuple(load_file(directory / f"rank{rank}.safetensors") for rank in range(world))
    for rank, tensors in enumerate(ranks):
        problems += [f"rank {rank}: {text}" for text in _tensor_problems(config, rank, tensors)]
    if not problems:
        problems += _rank_problems(config, ranks)
    if problems:
        raise LoadError(problems)
    return LoadedCheckpoint(directory=directory, config=config, ranks=ranks)


def expected_tensors(config: Mapping[str, Any], stage: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of every tensor that a rank of pipeline stage ``stage`` must have, and no others."""
    sizes = _sizes(config)
    section, stages = config["quantization"], config["mapping"]["pp_size"]
    found: dict[str, tuple[str, tuple[int, ...]]] = {}

    def add(group: Mapping[str, str], prefix: str = "", number: int = 0, **more: int) -> None:
        for name, text in group.items():
            dtype, *axes = text.split()
            shape = tuple(_size(axis, {**sizes, **more}) for axis in axes)
            found[prefix + name.replace(".N.", f".{number}.")] = (config["dtype"] if dtype == "model" else dtype, shape)

    if stage == 0:
        add(LAW["first_stage"])
    mode = dict(LAW["modes"][section["quant_algo"] or "none"])
    if section.get("pre_quant_scale"):
        mode |= LAW["pre_quant_scale"]
    for layer in range(config["num_hidden_layers"] // stages):
        prefix = f"transformer.layers.{layer}."
        add(LAW["layer"], prefix)
        if config["attn_bias"]:
            add(LAW["attn_bias"], prefix)
        if config.get("qwen_type") == "qwen3":
            add(LAW["qwen3"], prefix)
        for linear, text in LAW["linears"].items():
            rows, width = (_size(axis, sizes) for axis in text.split())
            add(mode, f"{prefix}{linear}.", **{"out": rows, "in": width})
        if section["kv_cache_quant_algo"]:
            add(LAW["kv_cache"], prefix)
    if stage == stages - 1:
        add(LAW["last_stage"])
    if config["architecture"].startswith("ReDrafter"):
        add(LAW["drafter"])
        for layer in range(config["redrafter_num_layers"]):
            add(LAW["drafter_layer"], number=layer)
        if config["redrafter_exit_dim"] != 2 * config["hidden_size"]:
            add(LAW["drafter_input_proj"])
        if config["redrafter_is_rnn"]:
            add(LAW["drafter_rnn"])
    return found


def _sizes(config: Mapping[str, Any]) -> dict[str, int]:
    tp, heads, kv = config["mapping"]["tp_size"], config["num_attention_heads"], config["num_key_value_heads"]
    vocab, head_size = config["vocab_size"], config["head_size"]
    return {
        "tp": tp, "V": vocab, "VP": math.ceil(vocab / tp) * tp, "H": config["hidden_size"], "A": heads * head_size,
        "D": head_size, "I": config["intermediate_size"], "X": config.get("redrafter_exit_dim", 0),
        "QKV": (heads // tp + 2 * math.ceil(kv / tp)) * head_size,
    }  # fmt: skip


def _size(text: str, sizes: Mapping[str, int]) -> int:
    def one(word: str) -> int:
        return sizes[word] if word in sizes else int(word)

    if "/" in text:
        left, _, right = text.partition("/")
        assert one(left) % one(right) == 0, f"{text} with {dict(sizes)}"
        return one(left) // one(right)
    return math.prod(one(word) for word in text.split("*"))


def _config_problems(config: Mapping[str, Any]) -> Iterator[str]:
    law = LAW["config"]
    kind = law["architectures"].get(config.get("architecture"))
    if kind is None:
        yield f"architecture {config.get('architecture')!r}: no such model"
        return
    redrafter = config["architecture"].startswith("ReDrafter")
    required = law["required"] | (law["qwen"] if kind == "qwen" else {}) | (law["redrafter"] if redrafter else {})
    before = []
    for name, typename in required.items():
        if name not in config:
            before.append(f"{name}: missing")
        elif not isinstance(config[name], _TYPES[typename]) or (isinstance(config[name], bool) and typename != "bool"):
            before.append(f"{name}: {config[name]!r} is no {typename}")
    before += [f"{name}: unknown key" for name in config if name not in required | law["optional"]]
    yield from before
    if not before:
        yield from _meaning_problems(config, redrafter=redrafter)
        yield from _quantization_problems(config, redrafter=redrafter)


def _meaning_problems(config: Mapping[str, Any], *, redrafter: bool) -> Iterator[str]:
    mapping, tp = config["mapping"], config["mapping"].get("tp_size", 0)
    if set(mapping) != {"world_size", "tp_size", "pp_size"} or mapping["world_size"] != tp * mapping["pp_size"]:
        yield f"mapping {mapping}"
        return
    if config["dtype"] not in ("bfloat16", "float16"):
        yield f"dtype {config['dtype']}"
    if config["position_embedding_type"] != "rope_gpt_neox" or config["hidden_act"] != "silu" or config["mlp_bias"]:
        yield "not a Qwen or Llama decoder"
    if "qwen_type" in config:
        named = config["base_model_architecture"] if redrafter else config["architecture"]
        if not named.lower().startswith(config["qwen_type"]):
            yield f"qwen_type {config['qwen_type']} contradicts {named}"
        if config["attn_bias"] != (config["qwen_type"] == "qwen2"):
            yield f"attn_bias {config['attn_bias']} with {config['qwen_type']}"
    scaling = config.get("rotary_scaling")
    if scaling is not None:
        # The real one fills what is missing with defaults, and reads past what it does not know.
        kinds = LAW["config"]["rotary_scaling"]
        kind = scaling.get("type")
        if kind not in kinds or scaling.get("rope_type") != kind or scaling.keys() != set(kinds[kind]):
            yield f"rotary_scaling {scaling}"
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    if heads % tp or (kv % tp and tp % kv) or config["intermediate_size"] % tp:
        yield f"heads {heads}, KV heads {kv} or intermediate size do not divide by tp {tp}"
    if config["num_hidden_layers"] % mapping["pp_size"]:
        yield "layers do not divide by pp_size"
    if redrafter:
        if mapping["pp_size"] > 1:
            yield "ReDrafter with pipeline parallelism"
        if config["vocab_size"] % tp or config["redrafter_exit_dim"] % tp:
            yield f"ReDrafter: vocab_size or exit_dim does not divide by tp {tp}"
        if config["redrafter_hidden_size"] != config["hidden_size"]:
            yield "redrafter_hidden_size is not hidden_size"


def _quantization_problems(config: Mapping[str, Any], *, redrafter: bool) -> Iterator[str]:
    section, tp = config["quantization"], config["mapping"]["tp_size"]
    yield from (f"quantization.{name}: unknown key" for name in section if name not in LAW["config"]["quantization"])
    algo, kv_algo = section.get("quant_algo"), section.get("kv_cache_quant_algo")
    if config.get("qwen_type") == "qwen3" and (algo in _NO_QK_NORM or str(algo).endswith("_PLUGIN")):
        yield f"{algo} swaps the attention class for one without q/k norm"
    if (algo or "none") not in LAW["modes"] or kv_algo not in (None, "FP8", "INT8"):
        yield f"quantization {algo}, KV cache {kv_algo}: not a mode of trtkit"
        return
    if algo == "W4A16_AWQ" and (section.get("group_size"), section.get("has_zero_point")) != (128, False):
        yield f"W4A16_AWQ with {section}"
    if algo == "W4A16_AWQ" and not isinstance(section.get("pre_quant_scale"), bool):
        yield "W4A16_AWQ does not say pre_quant_scale"
    if (algo or kv_algo or redrafter) and section.get("exclude_modules") != LAW["config"]["exclude_modules"]:
        yield f"exclude_modules {section.get('exclude_modules')}"
    step = {"W8A16": 64 * tp, "W4A16_AWQ": 128 * tp, "FP8": 16 * tp}.get(algo, 1)
    sizes = _sizes(config)
    for name, size in (("hidden", sizes["H"]), ("qkv", sizes["QKV"] * tp), ("heads", sizes["A"]), ("ffn", sizes["I"])):
        if size % (16 if algo == "FP8" and name == "hidden" else step):
            yield f"{name} {size} is no multiple of {step}"


def _tensor_problems(config: Mapping[str, Any], rank: int, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    expected = expected_tensors(config, rank // config["mapping"]["tp_size"])
    # The engine rounds an input with the scale in the model's dtype, and multiplies the product with the one stored.
    fp8_input = ".activation_scaling_factor" if config["quantization"]["quant_algo"] == "FP8" else ()
    yield from (f"{name}: missing" for name in expected if name not in tensors)
    yield from (f"{name}: provided but not required" for name in tensors if name not in expected)
    for name in expected.keys() & tensors.keys():
        dtype, shape = expected[name]
        tensor = tensors[name]
        found = str(tensor.dtype).removeprefix("torch.")
        if tuple(tensor.shape) != shape:
            yield f"{name}: shape {tuple(tensor.shape)}, expected {shape}"
        elif found != dtype:
            yield f"{name}: dtype {found}, expected {dtype}"
        elif not bool(tensor.float().isfinite().all()):
            yield f"{name}: not finite"
        elif "scaling_factor" in name and not bool((tensor > 0).all()):
            yield f"{name}: a scale is not positive"
        elif name.endswith(fp8_input) and not torch.equal(tensor, tensor.to(getattr(torch, config["dtype"])).float()):
            yield f"{name}: {config['dtype']} does not hold it"
    excluded = config["quantization"].get("exclude_modules")
    if excluded is not None:
        for name in tensors:
            module = name.rpartition(".")[0]
            inside = not module.startswith("transformer.layers.")
            if inside and module != "transformer.ln_f" and not any(fnmatchcase(module, p) for p in excluded):
                yield f"{name}: would be quantized"


def _rank_problems(config: Mapping[str, Any], ranks: tuple[dict[str, Tensor], ...]) -> Iterator[str]:
    """What must be the same on all ranks of a stage, and within a fused product."""
    tp = config["mapping"]["tp_size"]
    for stage in range(config["mapping"]["pp_size"]):
        first, *others = ranks[stage * tp : (stage + 1) * tp]
        for name, tensor in first.items():
            scalar = tensor.shape == (1,)
            shared = scalar or "layernorm" in name or "ln_f" in name or "vocab_embedding" in name
            if shared and not all(torch.equal(tensor, other[name]) for other in others):
                yield f"{name}: differs between ranks of stage {stage}"
            if name.endswith("mlp.fc.weights_scaling_factor") and scalar:
                twin = first[name.replace(".fc.", ".gate.")]
                if not torch.equal(tensor, twin):
                    yield f"{name}: fc and gate have different scales and are encoded anew when they are fused"
