"""What each Triton kernel takes, by its docstring: types, layouts, and numbers that must agree with the shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_FLOATS = ("bfloat16", "float16", "float32")
_POOLS = (*_FLOATS, "float8_e4m3fn", "int8")
_CODES = ("int8", "float8_e4m3fn")
_WHOLE = ("int32", "int64")

RULES: dict[str, dict[str, tuple[str, ...]]] = {
    "one_row": {
        "x_ptr": ("bfloat16",), "w_ptr": ("bfloat16",), "scale_ptr": ("float32",), "bias_ptr": ("float32",),
        "pre_ptr": ("bfloat16", "float32"), "out_ptr": ("bfloat16",),
    },
    "product": {
        "x_ptr": ("bfloat16", *_CODES), "w_ptr": ("bfloat16", *_CODES), "scale_ptr": ("float32",),
        "bias_ptr": ("float32",), "pre_ptr": ("bfloat16", "float32", *_CODES), "inverse_ptr": ("float32",),
        "out_ptr": ("bfloat16",), "partial_ptr": ("float32",), "arrived_ptr": ("int32",),
    },
    "product_words": {
        "x_ptr": ("bfloat16",), "w_ptr": ("int16",), "ratio_ptr": ("float16", "float32"), "scale_ptr": ("float32",),
        "bias_ptr": ("float32",), "pre_ptr": ("bfloat16", "float32"), "out_ptr": ("bfloat16",),
        "partial_ptr": ("float32",), "arrived_ptr": ("int32",),
    },
    "quantize_activations": {
        "x_ptr": ("bfloat16",), "pre_ptr": ("bfloat16", "float32"), "inverse_ptr": ("float32",), "codes_ptr": _CODES,
    },
    "expand_words": {
        "w_ptr": ("int16",), "ratio_ptr": ("float16", "float32"), "scale_ptr": ("float32",), "out_ptr": ("bfloat16",),
    },
    "rescale": {
        "sums_ptr": ("int32",), "scale_ptr": ("float32",), "bias_ptr": ("float32",), "out_ptr": ("bfloat16",),
    },
    "attend_split": {
        "q": _FLOATS, "k": _FLOATS, "v": _FLOATS, "key_pool": _POOLS, "value_pool": _POOLS, "table": _WHOLE,
        "cached": _WHOLE, "mask": ("int32",), "slots": ("int64",), "sums": ("float32",), "tops": ("float32",),
        "norms": ("float32",),
    },
    "combine_splits": {
        "out": _FLOATS, "sums": ("float32",), "tops": ("float32",), "norms": ("float32",), "cached": _WHOLE,
    },
    "add_norm": {"out": _FLOATS, "hidden": _FLOATS, "delta": _FLOATS, "weight": _FLOATS},
    "rotate": {"qkv": _FLOATS, "cos": _FLOATS, "sin": _FLOATS, "q_weight": _FLOATS, "k_weight": _FLOATS},
    "gated": {"out": _FLOATS, "gate_up": _FLOATS},
    "peak": {"peaks": ("float32",), "first": ("int32",), "logits": _FLOATS},
    "weigh": {
        "sums": ("int64",), "floors": ("int64",), "logits": _FLOATS, "peaks": ("float32",), "counters": ("int64",),
        "decisions": ("int64",), "temperature": ("float32",), "top_k": ("int64",), "top_p": ("float32",),
        "min_p": ("float32",),
    },
    "narrow": {
        "counters": ("int64",), "decisions": ("int64",), "logits": _FLOATS, "peaks": ("float32",), "sums": ("int64",),
        "temperature": ("float32",), "top_k": ("int64",), "top_p": ("float32",),
    },
    "draw": {
        "out": ("int64",), "logits": _FLOATS, "peaks": ("float32",), "first": ("int32",), "sums": ("int64",),
        "floors": ("int64",), "temperature": ("float32",), "cold": ("bool",), "seeds": ("int64",),
        "positions": ("int64",),
    },
}  # fmt: skip
"""Dtypes of each kernel's tensors."""

_STRIDED = {"q", "k", "v", "hidden", "delta", "qkv", "gate_up", "logits", "mask", "key_pool", "value_pool"}
"""Given with their stride; all others lie without gaps. The last dimension is dense in both."""
_POWERS = {
    "ROWS", "COLUMNS", "DEPTH", "BLOCK", "tile", "chunk", "tile_m", "tile_s", "tile_d", "split", "num_warps",
}  # fmt: skip
_UNUSED = {"pre_ptr", "inverse_ptr", "delta", "q_weight", "k_weight", "ratio_ptr"}
"""Any tensor will do where the kernel does not read it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One launch of a kernel."""

    name: str
    grid: tuple[int, ...]
    values: Mapping[str, Any]
    """Tensors and numbers."""
    constants: Mapping[str, Any]
    options: Mapping[str, Any]
    loose: frozenset[str] = frozenset()
    """Numbers and tensors whose value or alignment makes no variant."""

    def variant(self) -> tuple[object, ...]:
        """What Triton compiles anew for: types, constants, alignment to 16, numbers that are 1 or need 64 bits."""

        def kind(name: str, value: Any) -> object:
            if isinstance(value, Tensor):
                return value.dtype, name in self.loose or value.storage_offset() * value.element_size() % 16 == 0
            if isinstance(value, float):
                return float
            small = -(1 << 31) <= value < 1 << 31
            return small if name in self.loose else (small, value == 1, value % 16 == 0)

        values = tuple((name, kind(name, value)) for name, value in self.values.items())
        return (self.name, values, *sorted({**self.constants, **self.options}.items()))


def check_launch(launch: Launch) -> None:
    """Raises ``AssertionError`` for what a real launch would refuse, or read past."""
    name, rules = launch.name, RULES[launch.name]
    tensors = {key: value for key, value in launch.values.items() if isinstance(value, Tensor)}
    assert tensors.keys() == rules.keys(), f"{name}: {sorted(tensors.keys() ^ rules.keys())} are tensors, or are not"
    for key, tensor in tensors.items():
        fits = tensor.device.type == "cuda" and str(tensor.dtype).removeprefix("torch.") in rules[key]
        dense = tensor.is_contiguous() or (key in _STRIDED and tensor.stride(-1) == 1) or key in _UNUSED
        assert fits, f"{name}: {key} is {tensor.dtype} on {tensor.device}"
        assert dense, f"{name}: {key} {tuple(tensor.shape)} has strides {tensor.stride()}"
    assert launch.options.get("enable_fp_fusion") in (True, False), f"{name}: fusion is left to this Triton's default"
    assert 1 <= len(launch.grid) <= 3, name
    for size, most in zip(launch.grid, (2**31 - 1, 65535, 65535), strict=False):
        assert isinstance(size, int), f"{name}: grid {launch.grid}"
        assert 1 <= size <= most, f"{name}: grid {launch.grid}"
    for key, value in {**launch.constants, **launch.options}.items():
        if key in _POWERS:
            assert value > 0, f"{name}: {key} = {value}"
            assert value & (value - 1) == 0, f"{name}: {key} = {value}, no power of two"
    _SHAPES[name](launch, tensors)


def _products(launch: Launch, t: Mapping[str, Tensor]) -> None:
    n, k, m = launch.values["N"], launch.values["K"], launch.values.get("M", 1)
    assert t["x_ptr"].shape == (m, k), launch
    assert t["out_ptr"].shape == (m, n), launch
    assert t["scale_ptr"].shape == t["bias_ptr"].shape == (n,), launch
    assert t["w_ptr"].shape == (n, launch.values.get("WIDTH", k)), launch
    if launch.constants["PRE"]:
        assert t["pre_ptr"].shape == (k,), launch
    if launch.name == "one_row":
        return
    tiles = launch.grid[0] * launch.grid[1]
    assert launch.grid[0] * launch.constants["ROWS"] >= m, launch
    assert launch.grid[1] * launch.constants["COLUMNS"] >= n, launch
    splits = launch.values["splits"]
    assert launch.grid[2] == splits, launch
    if splits > 1:
        assert t["arrived_ptr"].numel() >= tiles, launch
        cells = tiles * splits * launch.constants["ROWS"] * launch.constants["COLUMNS"]
        assert t["partial_ptr"].numel() >= cells, launch
    if launch.name == "product":
        codes = t["w_ptr"].dtype if launch.constants["QUANTIZE"] else t["x_ptr"].dtype
        assert codes in (torch.bfloat16, t["w_ptr"].dtype), launch
        assert launch.constants["EVEN"] == (k % launch.constants["DEPTH"] == 0), launch
    else:
        ratios = launch.constants["BITS"] == 4
        assert t["ratio_ptr"].dtype == (torch.float16 if ratios else torch.float32), launch
        assert not ratios or t["ratio_ptr"].shape[0] * 128 >= k, launch


def _expansion(launch: Launch, t: Mapping[str, Tensor]) -> None:
    n, k, width = (launch.values[name] for name in ("N", "K", "WIDTH"))
    assert t["w_ptr"].shape == (n, width), launch
    assert t["out_ptr"].shape == (n, k), launch
    assert t["scale_ptr"].shape == (n,), launch
    if launch.constants["BITS"] == 4:
        assert t["ratio_ptr"].shape[1] == n, launch
        assert t["ratio_ptr"].stride() == (launch.values["ratio_stride"], 1), launch
    assert launch.grid == (-(-n // launch.constants["COLUMNS"]), width // 64), launch


def _activations(launch: Launch, t: Mapping[str, Tensor]) -> None:
    rows, depth = t["x_ptr"].shape
    assert (t["codes_ptr"].shape, launch.values["K"]) == ((rows, depth), depth), launch
    assert t["inverse_ptr"].numel() == 1, launch
    assert launch.grid == (rows, -(-depth // launch.constants["BLOCK"])), launch


def _sums(launch: Launch, t: Mapping[str, Tensor]) -> None:
    rows, columns = t["sums_ptr"].shape
    assert (t["out_ptr"].shape, launch.values["N"]) == ((rows, columns), columns), launch
    assert t["scale_ptr"].shape == t["bias_ptr"].shape == (columns,), launch
    assert launch.grid == (rows, -(-columns // launch.constants["BLOCK"])), launch


def _attention(launch: Launch, t: Mapping[str, Tensor]) -> None:
    constants, values = launch.constants, launch.values
    rows, nodes, head_dim = launch.grid[2], values["nodes"], constants["head_dim"]
    tokens, heads, width = t["q"].shape
    for size in (tokens * values["q_stride"], rows * values["table_width"], rows * values["mask_row"]):
        assert size < 1 << 31, launch  # computed in 32 bits
    kv_heads = launch.grid[1]
    assert (tokens, heads, width) == (rows * nodes, kv_heads * constants["group"], head_dim), launch
    assert t["k"].shape == t["v"].shape == (tokens, kv_heads, head_dim), launch
    for name in ("q", "k", "v"):
        assert t[name].stride() == (values[f"{name}_stride"], head_dim, 1), launch
    assert t["key_pool"].dtype == t["value_pool"].dtype, launch
    assert t["key_pool"].stride() == t["value_pool"].stride(), launch
    assert t["key_pool"].shape[0] == kv_heads, launch
    assert t["key_pool"].stride(0) == values["pool_stride"], launch
    assert t["table"].shape == (rows, values["table_width"]), launch
    assert t["cached"].shape == (rows,), launch
    assert t["mask"].shape == (rows, nodes, nodes), launch
    assert t["slots"].shape == (tokens,), launch
    assert launch.grid[0] == values["splits"] * values["m_tiles"], launch
    assert values["m_tiles"] * constants["tile_m"] >= nodes * constants["group"], launch
    assert values["splits"] * constants["split"] >= values["table_width"] * constants["block_size"], launch
    lines = nodes * constants["group"]
    assert t["sums"].shape == (rows, kv_heads, values["splits"], lines, head_dim), launch
    assert t["tops"].shape == t["norms"].shape == (rows, kv_heads, values["splits"], lines), launch


def _combination(launch: Launch, t: Mapping[str, Tensor]) -> None:
    heads, tokens = launch.grid
    assert t["out"].numel() < 1 << 31, launch
    assert t["out"].shape == (tokens, heads * launch.constants["head_dim"]), launch
    assert t["cached"].shape[0] * launch.values["nodes"] == tokens, launch
    assert t["sums"].shape[:4] == t["tops"].shape == t["norms"].shape, launch


def _norm(launch: Launch, t: Mapping[str, Tensor]) -> None:
    tokens, width = t["hidden"].shape
    assert launch.grid == (tokens,), launch
    assert t["out"].shape == t["delta"].shape == (tokens, width), launch
    assert (t["weight"].shape, launch.constants["width"]) == ((width,), width), launch
    assert launch.constants["tile"] >= width, launch
    for name in ("out", "hidden"):
        assert launch.values[f"{name}_stride"] == t[name].stride(0), launch
    assert not launch.constants["adds"] or launch.values["delta_stride"] == t["delta"].stride(0), launch


def _rotation(launch: Launch, t: Mapping[str, Tensor]) -> None:
    tokens, head_dim = t["qkv"].shape[0], launch.constants["head_dim"]
    assert launch.grid[0] == tokens, launch
    assert t["cos"].numel() == t["sin"].numel() == tokens * head_dim, launch
    assert t["cos"].dtype == t["sin"].dtype == t["qkv"].dtype, launch
    assert launch.values["stride"] == t["qkv"].stride(0), launch
    assert launch.constants["tile"] * 2 >= head_dim, launch
    if launch.constants["norms"]:
        assert t["q_weight"].shape == t["k_weight"].shape == (head_dim,), launch


def _gate(launch: Launch, t: Mapping[str, Tensor]) -> None:
    tokens, width = t["out"].shape
    assert t["gate_up"].shape == (tokens, 2 * width), launch
    assert launch.values["stride"] == t["gate_up"].stride(0), launch
    assert launch.constants["width"] == width, launch
    assert launch.grid == (tokens, -(-width // launch.constants["tile"])), launch


def _pick(launch: Launch, t: Mapping[str, Tensor]) -> None:
    picks, width = t["logits"].shape
    chunks = -(-width // launch.constants["chunk"])
    assert launch.values["width"] == width, launch
    assert launch.values["chunks"] == chunks, launch
    assert launch.values["stride"] == t["logits"].stride(0), launch
    assert launch.grid == ((picks,) if launch.name == "draw" else (picks, chunks)), launch
    assert launch.options["enable_fp_fusion"] is False, launch
    assert launch.constants.get("tile", chunks) >= chunks, launch
    for name in ("temperature", "top_k", "top_p", "min_p", "cold", "seeds", "positions", "out"):
        assert name not in t or t[name].shape == (picks,), launch
    for name in ("peaks", "first", "sums"):
        assert name not in t or t[name].shape == (picks, chunks), launch


_SHAPES = {
    "one_row": _products, "product": _products, "product_words": _products, "expand_words": _expansion,
    "quantize_activations": _activations, "rescale": _sums, "attend_split": _attention,
    "combine_splits": _combination, "add_norm": _norm, "rotate": _rotation, "gated": _gate, "peak": _pick,
    "weigh": _pick, "narrow": _pick, "draw": _pick,
}  # fmt: skip
