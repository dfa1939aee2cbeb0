"""TensorRT-LLM checkpoints: every mode through the strict loader, the golden table, and the weights themselves."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from drafter.checkpoint import load_drafter, public_names
from drafter.config import DrafterConfig, TreeShape
from tests.checkpoint.conftest import Native
from tests.examples import paired
from tests.tiny import LLAMA3, YARN
from tests.trtllm_double.loader import LAW, expected_tensors, load_checkpoint, rotations, weight_only_codes
from trtkit.checkpoint.names import LINEARS
from trtkit.checkpoint.shard_writer import ShardWriter
from trtkit.checkpoint.trtllm import TrtllmOptions, write_trtllm_checkpoint
from trtkit.checkpoint.trtllm_config import trtllm_config
from trtkit.checkpoint.trtllm_layout import rank_layout
from trtkit.checkpoint.trtllm_split import held_scale, share, weight_only_rows
from trtkit.checkpoint.unified import UnifiedCheckpoint, open_unified
from trtkit.checkpoint.unified_export import write_unified_hf
from trtkit.checkpoint.verify import relative_error
from trtkit.errors import CheckpointError, OutputError, UsageError
from trtkit.model_spec import ModelSpec, RopeSpec
from trtkit.quant.group import effective_weight
from trtkit.quant.tensor import dequantize, quantize_int8
from trtkit.scheme import SCHEMES

MANIFESTS = Path(__file__).parents[2].parent / "shared" / "reference" / "trtllm-manifests.json"
KINDS = ("bf16", "int8", "int8-sq", "fp8", "fp8+fp8", "bf16+int8", "int4", "int4-rtn")
TREE = TreeShape(beams=2, length=3)


def options(tp: int = 1, pp: int = 1, head: Path | None = None, **more: Any) -> TrtllmOptions:
    """Options with the test's tree where there is a head."""
    return TrtllmOptions(
        tensor_parallel=tp, pipeline_parallel=pp, drafter=head, tree=TREE if head else None, **more
    )  # fmt: skip


def share_of_product(source: UnifiedCheckpoint, layer: int, name: str, rank: int, ranks: int) -> torch.Tensor:
    """What the torch runtime multiplies with, cut by hand for one rank of a TensorRT-LLM linear."""
    linear = next(linear for linear in LINEARS if linear.name == name)
    parts = [source.part(layer, part) for part in linear.parts]
    weights = [part.weight for part in parts]
    if source.scheme.weight_format == "int4":  # its loader rounds the groups' scales to the model's dtype
        dtype = getattr(torch, source.spec.dtype)
        weights = [dataclasses.replace(weight, scale=weight.scale.to(dtype).float()) for weight in weights]
    matrices = [effective_weight(part, dequantize(weight)) for part, weight in zip(parts, weights, strict=True)]
    return share(matrices, ("out", "in"), linear.split, rank=rank, ranks=ranks, kv_heads=source.spec.kv_heads)


@pytest.mark.parametrize(("kind", "tp", "head"), paired(KINDS, (1, 2, 4, 8), ("none", "rnn", "rnn+proj", "plain")))
def test_every_mode_loads_and_holds_the_runtimes_weights(
    native: Native, head_dirs: dict[str, Path], tmp_path: Path, kind: str, tp: int, head: str
) -> None:
    # int4 at 8 ranks needs multiples of 1024.
    wide = {"hidden_size": 1024, "head_dim": 128} if kind.startswith("int4") and tp == 8 else {}
    directory = native("qwen2", kind, **wide)
    digests = write_trtllm_checkpoint(
        directory, tmp_path / "out", options(tp, head=head_dirs.get(f"{head}@1024" if wide else head))
    )
    loaded, source = load_checkpoint(tmp_path / "out"), open_unified(directory)
    assert sorted(digests) == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert loaded.redrafter == (head != "none")
    for rank in range(tp):
        for linear in LINEARS:
            made = loaded.weight(rank, f"transformer.layers.0.{linear.name}")
            wanted = share_of_product(source, 0, linear.name, rank, tp)
            if kind == "int8" and linear.split == "columns" and tp > 1:
                # The loader quantizes this rank's inputs anew, with a scale no coarser than ours: half a step for the
                # rounding of the row to bf16, and half a step again, or a whole one where it clips to 127.
                step = source.part(0, linear.parts[0]).weight.scale
                assert step is not None
                assert bool(((made - wanted).abs() <= step[:, None] * 1.5).all())
                assert relative_error(wanted, made) < 0.008
            else:
                assert torch.equal(made, wanted), f"{linear.name} on rank {rank}"
    tables = [tensors["lm_head.weight"] for tensors in loaded.ranks]
    assert torch.equal(torch.cat(tables)[: source.spec.vocab], source.lm_head())


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("kind", ["bf16", "int8", "fp8", "int4-rtn"])
def test_other_families(native: Native, head_dirs: dict[str, Path], tmp_path: Path, family: str, kind: str) -> None:
    directory = native(family, kind, tie_word_embeddings=family == "qwen3")
    write_trtllm_checkpoint(directory, tmp_path / "out", options(2, head=head_dirs["rnn"], greedy=True))
    loaded = load_checkpoint(tmp_path / "out")
    assert loaded.config["architecture"] == {"qwen3": "ReDrafterForQWenLM", "llama": "ReDrafterForLLaMALM"}[family]
    assert loaded.config["redrafter_greedy_search"] is True
    assert loaded.config.get("qwen_type") == ("qwen3" if family == "qwen3" else None)
    assert loaded.config["attn_bias"] is False
    source = open_unified(directory)
    assert ("transformer.layers.0.attention.q_layernorm.weight" in loaded.ranks[1]) == (family == "qwen3")
    assert torch.equal(loaded.ranks[1]["lm_head.weight"], source.lm_head()[160:]), "always written, also when tied"


@pytest.mark.parametrize("kind", ["bf16", "fp8+fp8"])
def test_pipeline_stages_count_their_layers_from_zero(native: Native, tmp_path: Path, kind: str) -> None:
    directory = native("qwen2", kind, num_hidden_layers=4)
    write_trtllm_checkpoint(directory, tmp_path / "out", options(2, 2))
    loaded, source = load_checkpoint(tmp_path / "out"), open_unified(directory)
    assert "lm_head.weight" not in loaded.ranks[0]
    assert "transformer.vocab_embedding.weight" not in loaded.ranks[2]
    for layer, (stage, index) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        made = loaded.weight(2 * stage + 1, f"transformer.layers.{index}.mlp.fc")
        assert torch.equal(made, share_of_product(source, layer, "mlp.fc", 1, 2))


def test_draft_head_is_split_by_rows(native: Native, head_dirs: dict[str, Path], tmp_path: Path) -> None:
    # Under the names that another writer gives its list.
    public = shutil.copytree(head_dirs["rnn+proj"], tmp_path / "head")
    tensors = load_file(public / "model.safetensors")
    save_file({name.replace("lm_head.", "lm_heads."): tensor for name, tensor in tensors.items()},
              public / "model.safetensors")  # fmt: skip
    write_trtllm_checkpoint(native("qwen2", "bf16"), tmp_path / "out", options(4, head=public))
    loaded = load_checkpoint(tmp_path / "out")
    head = load_drafter(head_dirs["rnn+proj"], dtype=torch.bfloat16, device=torch.device("cpu"))
    state = {public: head.state_dict()[name] for name, public in public_names(head.config).items()}
    for theirs, ours in (
        ("drafter.lm_head.weight", "lm_head.2.weight"),
        ("drafter.layers.1.linear.bias", "lm_head.1.linear.bias"),
        ("drafter.input_proj.weight", "input_proj.weight"),
        ("drafter.rnn_u.bias", "rnn_u.bias"),
    ):
        assert torch.equal(torch.cat([tensors[theirs] for tensors in loaded.ranks]), state[ours])
    assert (loaded.config["redrafter_num_beams"], loaded.config["redrafter_draft_len_per_beam"]) == (2, 3)


def test_vocabulary_is_padded_with_zero_rows(native: Native, tmp_path: Path) -> None:
    directory = native("qwen2", "bf16", vocab_size=333)
    write_trtllm_checkpoint(directory, tmp_path / "out", options(4))
    loaded = load_checkpoint(tmp_path / "out")
    assert [len(tensors["lm_head.weight"]) for tensors in loaded.ranks] == [84] * 4
    assert torch.equal(loaded.ranks[3]["lm_head.weight"][:81], open_unified(directory).lm_head()[252:])
    assert not loaded.ranks[3]["lm_head.weight"][81:].any()


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8", "bf16"])
def test_float16(native: Native, tmp_path: Path, kind: str) -> None:
    directory = native("qwen2", kind, dtype=torch.float16)
    write_trtllm_checkpoint(directory, tmp_path / "out", options(1))
    loaded, source = load_checkpoint(tmp_path / "out"), open_unified(directory)
    assert loaded.config["dtype"] == "float16"
    for linear in LINEARS:
        made = loaded.weight(0, f"transformer.layers.0.{linear.name}")
        assert torch.equal(made, share_of_product(source, 0, linear.name, 0, 1))


def test_dtype_can_be_chosen(native: Native, tmp_path: Path) -> None:
    write_trtllm_checkpoint(native("qwen2", "int4"), tmp_path / "out", options(1, dtype="float16"))
    tensors = load_checkpoint(tmp_path / "out").ranks[0]
    assert tensors["transformer.layers.0.mlp.fc.prequant_scaling_factor"].dtype == torch.float16
    assert tensors["transformer.layers.0.mlp.fc.weights_scaling_factor"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weight_only_rows_give_our_codes(dtype: torch.dtype) -> None:
    weight = torch.randn(512, 256) * torch.logspace(-3, 1, 512)[:, None]
    weight[7] = 0
    weight[8] = -weight[8].abs()
    weight[9] = weight[9].abs()
    ours = quantize_int8(weight.to(dtype), steps=128)
    assert ours.scale is not None
    rows = weight_only_rows(ours.data, ours.scale, dtype, where="test")
    codes, scale = weight_only_codes(rows)
    assert rows.dtype == dtype
    assert torch.equal(codes, ours.data)
    live = ours.data.any(dim=1)
    assert torch.equal(scale[live], ours.scale[live])
    # Without the extreme element many codes move: the trick is needed.
    plain, _ = weight_only_codes((ours.data.float() * ours.scale[:, None]).to(dtype))
    assert bool((plain != ours.data).float().mean() > 0.01)


@pytest.mark.parametrize("scale", [1e-9, 600.0])
def test_weight_only_rows_refuse_scales_that_float16_cannot_hold(scale: float) -> None:
    """At 600 the scale itself fits, and the element that stands for 128 of it does not."""
    codes = torch.tensor([[127, 3]], dtype=torch.int8)
    with pytest.raises(CheckpointError, match="float16 cannot hold"):
        weight_only_rows(codes, torch.tensor([scale]), torch.float16, where="qkv")


def test_the_scale_of_an_fp8_input_is_what_the_model_dtype_holds(native: Native, tmp_path: Path) -> None:
    """The engine divides the input by the scale in the model's dtype and multiplies the product with the stored one."""
    source = open_unified(native("qwen2", "fp8"))
    for dtype in ("bfloat16", "float16"):
        write_trtllm_checkpoint(source.directory, tmp_path / dtype, options(2, dtype=dtype))
        loaded = load_checkpoint(tmp_path / dtype)
        for linear in LINEARS:
            ours = source.part(0, linear.parts[0]).input_scale
            assert ours is not None
            found = loaded.ranks[1][f"transformer.layers.0.{linear.name}.activation_scaling_factor"]
            assert found.item() == ours.to(getattr(torch, dtype)).item()
    for scale in (1e-9, 1e5):
        with pytest.raises(CheckpointError, match="float16 cannot hold"):
            held_scale(torch.tensor(scale), torch.float16, where="qkv")


def test_codes_of_another_rule_are_refused(native: Native, tmp_path: Path) -> None:
    source = native("qwen2", "int8")
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3] = 5
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="reach neither -128 nor 127"):
        write_trtllm_checkpoint(tmp_path, tmp_path / "out", options(1))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "zero", "other"),
    [
        ("fp8", "mlp.up_proj.weight_scale", "mlp.down_proj.input_scale"),
        ("int4", "self_attn.o_proj.pre_quant_scale", "mlp.down_proj.weight_scale"),
    ],
)
def test_scales_that_are_not_positive_are_all_listed(
    native: Native, tmp_path: Path, kind: str, zero: str, other: str
) -> None:
    source = native("qwen2", kind)
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"model.layers.0.{zero}"].fill_(0)
    tensors[f"model.layers.0.{other}"].fill_(float("inf"))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        write_trtllm_checkpoint(tmp_path, tmp_path / "out", options(1))
    assert len(caught.value.offenders) == 2
    assert not (tmp_path / "out").exists()


def test_pre_scales_that_only_some_linears_have_are_refused(native: Native, tmp_path: Path) -> None:
    """One key of config.json says for all linears whether they have one."""
    source = shutil.copytree(native("qwen2", "int4"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.0.mlp.down_proj.pre_quant_scale"]
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match="some linears have a pre_quant_scale") as caught:
        write_trtllm_checkpoint(source, tmp_path / "out", options(1))
    assert caught.value.offenders == ("model.layers.0.mlp.down_proj: none",)


def test_a_disk_that_fills_up_leaves_nothing(native: Native, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, written = native("qwen2", "fp8"), 0
    put = ShardWriter._put

    def full(self: ShardWriter, data: memoryview) -> None:
        nonlocal written
        written += len(data)
        if written > 1_000_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        put(self, data)

    monkeypatch.setattr(ShardWriter, "_put", full)
    with pytest.raises(OutputError, match="No space left"):
        write_trtllm_checkpoint(directory, tmp_path / "out", options(2))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_known_before(
    native: Native, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = native("qwen2", "bf16")
    one = sum(entry.nbytes for entry in open_unified(directory).shards.entries.values())

    class Usage:
        free = int(1.2 * one)

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    write_trtllm_checkpoint(directory, tmp_path / "one", options(1))
    with pytest.raises(OutputError, match="too full"):
        write_trtllm_checkpoint(directory, tmp_path / "eight", options(8))
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_the_source_is_never_replaced(native: Native, tmp_path: Path) -> None:
    directory = shutil.copytree(native("qwen2", "bf16"), tmp_path / "place" / "engine")
    for place in (directory, directory.parent):
        with pytest.raises(UsageError, match="would replace"):
            write_trtllm_checkpoint(directory, place, options(1), replace=True)
        with pytest.raises(UsageError, match="would replace"):
            write_unified_hf(directory, place, replace=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(OutputError, match="already exists"):
        write_trtllm_checkpoint(directory, tmp_path / "out", options(1))


def spec_of(config: dict[str, Any]) -> ModelSpec:
    """The spec that a manifest's configuration describes."""
    return ModelSpec(
        family=config["qwen_type"], layers=config["num_hidden_layers"], hidden=config["hidden_size"],
        heads=config["num_attention_heads"], kv_heads=config["num_key_value_heads"], head_dim=config["head_size"],
        intermediate=config["intermediate_size"], vocab=config["vocab_size"],
        rope=RopeSpec(theta=config["rotary_base"]), norm_eps=config["norm_epsilon"],
        qkv_bias=config["qwen_type"] == "qwen2", qk_norm=config["qwen_type"] == "qwen3", tied=False,
        max_positions=config["max_position_embeddings"], dtype=config["dtype"],
    )  # fmt: skip


@pytest.mark.skipif(not MANIFESTS.is_file(), reason="the manifests are not part of the project")
def test_golden_table_and_writer_agree_with_the_manifests() -> None:
    """Manifests: what TensorRT-LLM's own classes asked for, on a tiny model of each mode."""
    entries = json.loads(MANIFESTS.read_text())["entries"]
    assert len(entries) == 48
    for name, entry in entries.items():
        config, disk = entry["config"], {key: (dtype, tuple(shape)) for key, (shape, dtype) in entry["disk"].items()}
        assert expected_tensors(config, 0) == disk, name
        section = config["quantization"]
        scheme = next(scheme for scheme in SCHEMES.values() if scheme.quant_algo == section["quant_algo"])
        kv: Literal["fp8", "model"] = "fp8" if section["kv_cache_quant_algo"] else "model"
        head, choice = None, TrtllmOptions(tensor_parallel=config["mapping"]["tp_size"])
        if config["architecture"].startswith("ReDrafter"):
            head = DrafterConfig(
                hidden_size=config["hidden_size"], vocab_size=config["vocab_size"],
                exit_dim=config["redrafter_exit_dim"], num_draft_layers=config["redrafter_num_layers"],
                rnn=config["redrafter_is_rnn"],
            )  # fmt: skip
            tree = TreeShape(beams=config["redrafter_num_beams"], length=config["redrafter_draft_len_per_beam"])
            choice = TrtllmOptions(
                tensor_parallel=config["mapping"]["tp_size"], drafter=Path("head"), tree=tree, greedy=True
            )  # fmt: skip
        scheme = dataclasses.replace(scheme, kv_dtype=kv)
        pre_scale = scheme.name in ("int8-sq", "int4")
        layout = rank_layout(spec_of(config), scheme, choice, head, stage=0, pre_scale=pre_scale)
        ours = {key: (str(dtype).removeprefix("torch."), shape) for key, (dtype, shape) in layout.items()}
        assert ours == disk, name
        written = trtllm_config(spec_of(config), scheme, choice, head, pre_scale=pre_scale)
        extra = written.keys() - config.keys()
        assert extra == {"tie_word_embeddings", "disable_weight_only_quant_plugin"}, name
        # The list of excluded modules is written whenever there is a head, also for an unquantized base.
        written["quantization"].setdefault("exclude_modules", None)
        section.setdefault("exclude_modules", LAW["config"]["exclude_modules"] if head is not None else None)
        assert {key: written[key] for key in config} == config, name


@pytest.mark.parametrize(
    ("family", "scaling"),
    [("llama", None), ("qwen2", {**YARN, "beta_fast": 20.0}), ("llama", {**LLAMA3, "factor": 5.0})],
)
def test_the_engine_turns_like_transformers(
    native: Native, tmp_path: Path, family: str, scaling: dict[str, Any] | None
) -> None:
    """The engine makes its table of rotations from config.json alone."""
    directory = native(family, "bf16", rope_scaling=scaling)
    write_trtllm_checkpoint(directory, tmp_path / "out", options(1))
    config = AutoConfig.from_pretrained(directory)
    wanted, wanted_factor = 10000.0 ** (-torch.arange(0, 64, 2) / 64), 1.0
    if scaling is not None:
        wanted, wanted_factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"))
    speeds, factor = rotations(load_checkpoint(tmp_path / "out").config)
    torch.testing.assert_close(speeds.float(), wanted, rtol=1e-6, atol=0)
    assert factor == pytest.approx(wanted_factor)
