"""Bundles and compilation through the double: what ends up on the disk, and what is refused before anything is done."""

from __future__ import annotations

import dataclasses
import errno
import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.test_trtllm_refusals import QWEN25_14B
from tests.trtllm_double.install import forget_double, install_double, install_gpu
from tests.trtllm_double.model import make_recipe, save_head, save_model, sources
from trtkit.build import trtllm
from trtkit.build.bundle import build_trtllm, compile_bundle, equivalent_command, prepare_bundle
from trtkit.build.trtllm import Compilation, compile_engine, require_tensorrt_llm
from trtkit.build.trtllm_config import PluginPlan, plan_build
from trtkit.errors import (
    CapacityError,
    CheckpointError,
    EngineError,
    MissingDependency,
    OutputError,
    TrtkitError,
    UnsupportedError,
    UsageError,
)
from trtkit.recipe import read_manifest, read_recipe


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, int8, prepared on a machine without GPU and without TensorRT-LLM."""
    out = tmp_path_factory.mktemp("prepared") / "my bundle"
    prepare_bundle(make_recipe(model, ranks=2, precision="int8"), out, sources())
    return out


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A GPU host: TensorRT-LLM 1.0.0 and an L4."""
    install_double(monkeypatch, tmp_path / "dist")
    yield monkeypatch
    forget_double()


def leftovers(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name not in ("dist", "bundle"))


def test_a_bundle_holds_all_that_the_gpu_host_needs(bundle: Path) -> None:
    names = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert {"bundle.json", "recipe.toml", "README.txt", "config.json", "tokenizer.json", "checkpoint/config.json",
            "checkpoint/rank0.safetensors", "checkpoint/rank1.safetensors"} <= names  # fmt: skip
    assert not [name for name in names if name.startswith("native") or name in ("engine.json", "model.safetensors")]
    recipe = read_recipe(bundle / "recipe.toml")
    assert (recipe.backend, recipe.tensor_parallel, recipe.gpu) == ("tensorrt-llm", 2, "l4x2")
    # What TensorRT-LLM runs, and what the quality was measured with: the native half must not settle on int8.
    manifest = read_manifest(bundle, "bundle.json")
    assert recipe.output_layer == "model"
    assert manifest.recipe == recipe
    config = json.loads((bundle / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config, "it is the model's own, not that of the int8 codes"
    text = (bundle / "README.txt").read_text(encoding="utf-8")
    assert "    trtkit compile 'my bundle' --out engine\n" in text
    assert "nvcr.io/nvidia/tensorrt-llm/release:1.0.0" in text
    assert re.search(r"trtllm-build --checkpoint_dir 'my bundle/checkpoint' .*--workers 2", text)


def test_compile(bundle: Path, host: pytest.MonkeyPatch, tmp_path: Path) -> None:
    manifest = compile_bundle(bundle, tmp_path / "engine")
    assert read_manifest(tmp_path / "engine") == manifest
    assert manifest.versions["tensorrt-llm"] == "1.0.0"
    assert manifest.versions["compute capability"] == "8.9"
    assert {"trtkit", "torch"} <= manifest.versions.keys(), "what prepared it, too"
    assert manifest.flags is not None
    assert manifest.flags["max_batch_size"] == "8"
    assert {"compiled/rank0.engine", "compiled/rank1.engine", "compiled/config.json", "tokenizer.json"} <= (
        manifest.checkpoint_digest.keys()
    )
    built = json.loads((tmp_path / "engine" / "compiled" / "config.json").read_text(encoding="utf-8"))
    assert built["build_config"]["plugin_config"]["use_fused_mlp"] is False
    assert built["build_config"]["input_timing_cache"] is None
    again = compile_bundle(bundle, tmp_path / "again")
    built = json.loads((tmp_path / "again" / "compiled" / "config.json").read_text(encoding="utf-8"))
    assert built["build_config"]["input_timing_cache"] == str(tmp_path / ".timing-1.0.0-sm89.cache")
    assert again.quality == manifest.quality
    with pytest.raises(OutputError, match="already exists"):
        compile_bundle(bundle, tmp_path / "engine")
    assert compile_bundle(bundle, tmp_path / "engine", force=True).versions == manifest.versions


def test_building_in_one_go_leaves_no_checkpoint(model: Path, host: pytest.MonkeyPatch, tmp_path: Path) -> None:
    manifest = build_trtllm(make_recipe(model, precision="int4", int4_method="rtn"), tmp_path / "engine", sources())
    assert {path.name for path in (tmp_path / "engine").iterdir() if path.is_dir()} == {"compiled"}
    assert all((tmp_path / "engine" / name).is_file() for name in manifest.checkpoint_digest)
    assert (tmp_path / ".timing-1.0.0-sm89.cache").is_file(), "kept for the next build"


@pytest.mark.parametrize(
    ("gpu", "capability", "tree", "kv_dtype"),
    [
        ("a100", (8, 0), "", "model"), ("l4", (8, 9), "", "fp8"), ("l4", (8, 9), "4x4", "model"),
        ("h100", (9, 0), "", "fp8"), ("h100", (9, 0), "1x3", "model"),
    ],
)  # fmt: skip
def test_the_builder_has_nothing_to_override(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: str, capability: tuple[int, int], tree: str,
    kv_dtype: str,
) -> None:  # fmt: skip
    """The double raises where the builder would change a setting on its own."""
    install_double(monkeypatch, tmp_path / "dist", version="1.2.1", capability=capability)
    head = save_head(tmp_path / "head") if tree else None
    build_trtllm(make_recipe(model, gpu=gpu, tree=tree, kv_dtype=kv_dtype), tmp_path / "engine", sources(head))
    forget_double()


@pytest.mark.parametrize(
    ("version", "error", "said"),
    [
        (None, MissingDependency, "--prepare-only"),
        ("0.20.0", UnsupportedError, "too old"),
        ("1.3.0rc20", UnsupportedError, "export DIR --format unified-hf"),
        ("2.0.0", UnsupportedError, "removed after 1.2"),
    ],
)
def test_the_version_window(
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str | None,
    error: type[TrtkitError],
    said: str,
) -> None:
    install_gpu(monkeypatch, (8, 9))
    if version is not None:
        install_double(monkeypatch, tmp_path / "dist", version=version)
    with pytest.raises(error) as caught:
        compile_bundle(bundle, tmp_path / "engine")
    assert said in str(caught.value)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("version", ["1.0.0", "1.1.0", "1.2.1", "1.2.0rc6.post3"])
def test_inside_the_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    install_double(monkeypatch, tmp_path, version=version)
    assert require_tensorrt_llm() == version


def test_the_wrong_gpu(bundle: Path, host: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install_gpu(host, (9, 0))
    with pytest.raises(UnsupportedError, match=r"capability 9\.0, the recipe is for 2x L4 \(8\.9\)"):
        compile_bundle(bundle, tmp_path / "engine")
    install_gpu(host, None)
    with pytest.raises(UnsupportedError, match="shows none"):
        compile_bundle(bundle, tmp_path / "engine")


def test_a_damaged_bundle(bundle: Path, host: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    (copy / "checkpoint" / "rank1.safetensors").unlink()
    (copy / "tokenizer.json").write_text("{}")
    (copy / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError) as caught:
        compile_bundle(copy, tmp_path / "engine")
    assert len(caught.value.offenders) == 3
    with pytest.raises(EngineError, match="not a bundle"):
        compile_bundle(copy / "checkpoint", tmp_path / "engine")
    with pytest.raises(UsageError, match="would replace"):
        compile_bundle(bundle, bundle.parent, force=True)


def test_a_full_disk_leaves_nothing(bundle: Path, host: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tensorrt_llm.builder import Engine

    real = Engine.save

    def full(self: Any, engine_dir: str) -> None:
        real(self, engine_dir)
        if self.model.config.rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    host.setattr(Engine, "save", full)
    with pytest.raises(OutputError, match="No space left"):
        compile_bundle(bundle, tmp_path / "engine")
    assert leftovers(tmp_path) == [".timing-1.0.0-sm89.cache"]


def test_a_disk_that_is_too_small_is_noticed_first(bundle: Path, host: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)
    host.setattr(trtllm.shutil, "disk_usage", lambda place: usage._replace(free=1000))
    with pytest.raises(OutputError, match="the engines need about"):
        compile_bundle(bundle, tmp_path / "engine")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("compiled", [False, True])
def test_a_disk_that_cannot_hold_both_halves_is_noticed_before_the_first(
    model: Path, bundle: Path, host: pytest.MonkeyPatch, tmp_path: Path, compiled: bool
) -> None:
    """The native checkpoint would fit, and with it an hour would be spent."""
    ranks = sum(path.stat().st_size for path in (bundle / "checkpoint").glob("*.safetensors"))
    usage = shutil.disk_usage(tmp_path)
    # Beside the ranks there is room for the int8 checkpoint and not for the engines.
    host.setattr(shutil, "disk_usage", lambda place: usage._replace(free=int(1.9 * ranks) if compiled else ranks))

    def converted(*_: object, **__: object) -> None:
        raise AssertionError("began before it had looked")

    host.setattr("trtkit.build.native.convert", converted)
    recipe, make = make_recipe(model, ranks=2, precision="int8"), build_trtllm if compiled else prepare_bundle
    with pytest.raises(OutputError, match="the disk is too full"):
        make(recipe, tmp_path / "out", sources())
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("problem", "error"),
    [(RuntimeError("CUDA error: out of memory"), CapacityError), (MemoryError(), CapacityError),
     (AssertionError("no tactic"), EngineError), (KeyError("Qwen9ForCausalLM"), EngineError)],
)  # fmt: skip
def test_a_build_that_fails(
    bundle: Path, host: pytest.MonkeyPatch, tmp_path: Path, problem: Exception, error: type[TrtkitError]
) -> None:
    import tensorrt_llm.builder

    def broken(model: Any, build_config: Any) -> None:
        raise problem

    host.setattr(tensorrt_llm.builder, "build", broken)
    with pytest.raises(error) as caught:
        compile_bundle(bundle, tmp_path / "engine")
    assert "rank 0" in str(caught.value)
    assert caught.value.hint
    assert leftovers(tmp_path) == []


def test_a_builder_that_makes_nothing_without_an_error(bundle: Path, host: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import tensorrt_llm.builder

    host.setattr(tensorrt_llm.builder.Engine, "save", lambda self, engine_dir: None)
    with pytest.raises(EngineError, match="not every file is there") as caught:
        compile_bundle(bundle, tmp_path / "engine")
    assert caught.value.offenders == ("config.json", "rank0.engine", "rank1.engine")
    host.setattr(tensorrt_llm.builder, "build", lambda model, build_config: None)
    with pytest.raises(EngineError, match="built nothing for rank 0"):
        compile_bundle(bundle, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_a_setting_that_this_release_does_not_have_is_never_dropped(host: pytest.MonkeyPatch, tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
    class Later(PluginPlan):
        use_later_fmha: bool = True

    plan = plan_build(make_recipe(tmp_path), QWEN25_14B)
    given = {field.name: getattr(plan.plugins, field.name) for field in dataclasses.fields(plan.plugins)}
    plan = dataclasses.replace(plan, plugins=Later(**given))
    job = Compilation(checkpoint=tmp_path, out=tmp_path / "out", plan=plan, timing_cache=tmp_path / "cache")
    with pytest.raises(UnsupportedError, match="no plugin setting 'use_later_fmha'"):
        trtllm._build_config(job)


def test_impossible_recipes_are_refused_before_anything_is_read(model: Path, tmp_path: Path) -> None:
    odd = save_model(tmp_path / "odd", vocab_size=321)
    head = save_head(tmp_path / "head", vocab=321)
    for recipe, said in (
        (make_recipe(odd, ranks=2, tree="1x3"), "321"),
        (make_recipe(model, ranks=8), "8"),
        (make_recipe(model, gpu="a100", precision="fp8"), "8.9"),
        (make_recipe(model, gpu="cpu"), "--gpu"),
    ):
        with pytest.raises(UnsupportedError) as caught:
            prepare_bundle(recipe, tmp_path / "out", sources(head if recipe.tree else None))
        assert said in str(caught.value)
    assert leftovers(tmp_path) == ["head", "odd"]


def test_force_replaces_bundles_only(bundle: Path, model: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"no bundle\.json"):
        prepare_bundle(make_recipe(model), mine, sources(), force=True)
    assert (mine / "thesis.tex").exists()


def test_the_equivalent_command(model: Path) -> None:
    line = equivalent_command(make_recipe(model, ranks=2), sources(), Path("out"))
    assert line.startswith("trtllm-build --checkpoint_dir out/checkpoint --output_dir out/compiled --max_batch_size 8 ")


@pytest.mark.parametrize(
    ("ranks", "gpus", "workers", "devices"),
    [(4, 2, None, [0, 1, 0, 1]), (4, 2, 4, [0, 1, 0, 1]), (2, 4, None, [0, 1]), (2, 4, 1, [0, 0])],
)
def test_no_rank_is_compiled_on_a_gpu_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ranks: int, gpus: int, workers: int | None, devices: list[int]
) -> None:
    seen = {}

    def built(job: Compilation, rank: int, device: int) -> None:
        seen[rank] = device
        for name in ("config.json", f"rank{rank}.engine"):
            (job.out / name).touch()

    class Threads(ThreadPoolExecutor):
        def __init__(self, count: int, mp_context: object) -> None:
            super().__init__(count)

    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr(trtllm, "ProcessPoolExecutor", Threads)
    monkeypatch.setattr(trtllm, "_build_rank", built)
    recipe = make_recipe(tmp_path, ranks=ranks)
    plan = plan_build(recipe, QWEN25_14B)
    job = Compilation(checkpoint=tmp_path, out=tmp_path / "out", plan=plan, timing_cache=tmp_path / "cache")
    compile_engine(job, workers=workers)
    assert [seen[rank] for rank in range(ranks)] == devices


@pytest.mark.slow
def test_ranks_are_compiled_by_worker_processes(bundle: Path, host: pytest.MonkeyPatch, tmp_path: Path) -> None:
    manifest = compile_bundle(bundle, tmp_path / "engine", workers=2)
    one = compile_bundle(bundle, tmp_path / "one", workers=1)
    for name in ("compiled/rank0.engine", "compiled/rank1.engine"):
        assert manifest.checkpoint_digest[name] == one.checkpoint_digest[name]
