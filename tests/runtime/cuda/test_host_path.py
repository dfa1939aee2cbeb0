"""The host's side of the CUDA path: what it hands to the device, in and out of a captured step. No GPU is needed."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from drafter.config import DrafterConfig, TreeShape
from drafter.data import Sample, Window
from drafter.loss import draft_loss
from drafter.model import Drafter
from tests.engines import random_prompts, request, tiny_engine_dir
from tests.examples import slow
from tests.runtime.cuda.fake_gpu import CUDA, FakeGpu, fake_gpu
from trtkit.bench import device_clock, gpu_points
from trtkit.bench.gpu_points import PointPlan, measure_point, profile_point
from trtkit.bench.random_model import RandomWeights, random_drafter, random_head, shape_spec
from trtkit.checkpoint.hf import open_source
from trtkit.checkpoint.quality import measure_quality
from trtkit.checkpoint.unified import open_unified
from trtkit.decoder import LINEAR_PARTS, LinearName, Norms
from trtkit.errors import UsageError
from trtkit.model_spec import ModelSpec
from trtkit.quant.batches import TextRow
from trtkit.quant.calibrate import LayerwiseCalibrator
from trtkit.quant.group import quantize_group
from trtkit.quant.tensor import LinearWeights, dense
from trtkit.runtime.api import SwitchPenalty
from trtkit.runtime.cuda import graphs, launch
from trtkit.runtime.cuda.dependent import SWITCH as EARLY
from trtkit.runtime.draft_head import with_kernels
from trtkit.runtime.kv_cache import kv_block_bytes
from trtkit.runtime.load import OpenOptions, device_named, open_engine
from trtkit.runtime.model import DecoderModel
from trtkit.runtime.native.loader import SWITCH
from trtkit.runtime.torch_engine import TorchEngine
from trtkit.runtime.torch_options import Drafting, TorchLimits
from trtkit.scheme import KvDtype, OutputLayer, Precision, scheme_named
from trtkit.training.evaluate import hits_by_depth
from trtkit.training.target import draft_batch

CPU = torch.device("cpu")
CHAIN, TREE = TreeShape(beams=1, length=3), TreeShape(beams=3, length=2)
STEP = {"add_norm", "rotate", "gated", "attend_split", "combine_splits", "peak", "weigh", "draw"}
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0}, {"top_p": 0.8, "top_k": 6}, {"top_k": 3}, {"top_p": 0.9, "min_p": 0.1}, {"temperature": 1.0},
]  # fmt: skip


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    monkeypatch.setattr(graphs, "_WARM_UPS", 1)  # the second one would be the same
    with fake_gpu(monkeypatch) as made:
        yield made


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Stored(RandomWeights):
    """Weights as a checkpoint gives them: on the host, with all that a precision may have."""

    def linear(self, layer: int, name: LinearName) -> LinearWeights:
        made = super().linear(layer, name)
        if self.precision not in ("int8-sq", "int4"):
            return made
        return dataclasses.replace(made, pre_scale=torch.ones(made.weight.shape[1], dtype=torch.bfloat16))

    def kv_scales(self, layer: int) -> tuple[float, float] | None:
        return 0.5, 0.25


def _spec(**changes: Any) -> ModelSpec:
    return dataclasses.replace(shape_spec("tiny"), layers=1, **changes)


def _model(
    precision: Precision = "bf16", spec: ModelSpec | None = None, *, dtype: torch.dtype = torch.bfloat16,
    output_layer: OutputLayer = "model", max_tokens: int = 4096,
) -> DecoderModel:  # fmt: skip
    weights = _Stored(spec=spec or _spec(), precision=precision, device=CPU)
    return DecoderModel(weights, device=CUDA, dtype=dtype, max_tokens=max_tokens, output_layer=output_layer)


def _engine(
    model: DecoderModel, trees: tuple[TreeShape | None, ...] = (None,), *, coded: bool = False, **limits: Any
) -> TorchEngine:  # fmt: skip
    drafting = None
    if trees != (None,):
        head = random_drafter(model.spec, device=CUDA, dtype=model.dtype)
        head.trim(torch.arange(48, device=CUDA))
        head = with_kernels(head, "int8" if coded else "model", device=CUDA, dtype=model.dtype)
        drafting = Drafting(head=head, trees=trees)
    return TorchEngine(model, TorchLimits(**{"rows": 8, "total_tokens": 3000, "kv_blocks": 900, **limits}), drafting)


def _finish(engine: TorchEngine) -> None:
    while engine.has_work:
        engine.step()


def _play(engine: TorchEngine, kinds: Sequence[dict[str, Any]]) -> None:
    """Batches of all kinds: forked and chunked prompts, every cut, logprobs, pauses and extensions."""
    short, long = random_prompts(0, [19, 2500])
    for kind in kinds:
        for index, prompt in enumerate((short, short, short)):
            made = request(str(index), prompt, max_tokens=9, **kind)
            engine.submit(dataclasses.replace(made, logprobs=kind == KINDS[1], hold=index == 1))
        for _ in range(3):
            engine.step()
        engine.pause("1")
        engine.step()
        engine.extend("1", (1, 2, 3), max_tokens=5)
        _finish(engine)
        engine.cancel("1")
    engine.submit(request("long", long, max_tokens=2))
    _finish(engine)


@pytest.mark.parametrize(
    ("precision", "kv_dtype", "trees", "kernels"),
    [
        ("bf16", "model", (None,), {"product"}),
        ("int8", "int8", (CHAIN,), {"product_words", "expand_words"}),
        ("int8-sq", "fp8", (TREE,), {"product", "quantize_activations", "rescale"}),
        ("fp8", "fp8", (None, CHAIN), {"product", "quantize_activations"}),
        ("int4", "model", (TREE,), {"product_words", "expand_words"}),
    ],
)
def test_an_engine_runs_on_the_device_and_its_steps_wait_for_nothing(
    gpu: FakeGpu, precision: Precision, kv_dtype: KvDtype, trees: tuple[TreeShape | None, ...], kernels: set[str]
) -> None:
    coded = precision == "int8"
    spec = _spec(qk_norm=precision == "fp8", qkv_bias=precision != "fp8")
    model = _model(precision, spec, output_layer="int8" if coded else "model")
    engine = _engine(model, trees, kv_dtype=kv_dtype, coded=coded)
    _play(engine, KINDS if precision == "bf16" else KINDS[::3])
    assert engine._graphs is not None
    assert engine._graphs._captures, "no step could be captured"
    assert all(graph.captured == 1 for graph in gpu.graphs)
    assert gpu.launched() >= STEP | kernels
    for index, prompt in enumerate(random_prompts(1, [5, 9])):
        engine.submit(request(str(index), prompt, max_tokens=500))
    for _ in range(4):
        engine.step()
    plain = 0
    for _ in range(8):
        waited, captured = gpu.waits, len(gpu.graphs)
        engine.step()
        if len(gpu.graphs) == captured:
            plain += 1
            assert gpu.waits - waited == 1, "a step waits for its output and for nothing else"
    assert plain >= 5


@pytest.mark.parametrize("tree", [slow(TreeShape(beams=1, length=8)), TreeShape(beams=2, length=4)], ids=str)
def test_drafts_that_the_host_looks_up_come_with_the_input(gpu: FakeGpu, tree: TreeShape) -> None:
    """No head, nothing launched ahead of what is looked up, and no copy or wait more than without drafts."""
    model = _model()
    limits = TorchLimits(rows=8, total_tokens=3000, kv_blocks=900)
    engine = TorchEngine(model, limits, Drafting(lookup=True, trees=(tree,)))
    _play(engine, KINDS[:2])
    assert engine._graphs is not None
    assert engine._graphs._captures, "no step could be captured"
    for index in range(2):
        engine.submit(request(str(index), (1, 2, 3, 1, 2), max_tokens=300))
    for _ in range(4):
        engine.step()
    waited, drafted = gpu.waits, engine.stats().drafted_row_steps
    for _ in range(8):
        engine.step()
    assert engine.stats().drafted_row_steps - drafted == 16
    assert gpu.waits - waited == 8, "a step waits for its output and for nothing else"
    assert engine.stats().discarded_row_steps == 0


def test_no_sum_has_a_launch_of_its_own(gpu: FakeGpu) -> None:
    """What a layer adds is added by the norm behind it: at one row each launch costs about as much as it computes."""
    model = _model(spec=dataclasses.replace(_spec(), layers=3))
    engine = _engine(model)
    engine.submit(request("a", (1, 2, 3), max_tokens=2))
    engine.step()
    gpu.launches.clear()
    engine._graphs.step(engine._graphs.load(engine._scheduler.running, None))
    norms = [launch.constants["adds"] for launch in gpu.launches if launch.name == "add_norm"]
    assert norms == [False, *[True] * 6]


@pytest.mark.parametrize(("capability", "switch"), [((8, 9), "1"), ((9, 0), "1"), ((9, 0), "")])
def test_what_a_layer_launches_starts_early_on_hopper_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], switch: str
) -> None:  # fmt: skip
    """Both halves of it: a kernel that is launched early and does not wait reads what is not there yet."""
    monkeypatch.setenv(EARLY, switch)
    hopper = capability == (9, 0) and switch == "1"
    with fake_gpu(monkeypatch, capability=capability) as gpu:
        for precision in ("bf16", "fp8", "int4"):
            engine = _engine(_model(precision))
            engine.submit(request("a", (1, 2, 3), max_tokens=2))
            engine.step()
        layer = [launch for launch in gpu.launches if launch.name not in ("peak", "weigh", "draw", "expand_words")]
        assert {launch.name for launch in layer} >= {"product", "product_words", "add_norm", "combine_splits"}
        for launch in layer:
            early = (launch.options.get("launch_pdl", False), launch.constants.get("early", False))
            assert early == (hopper, hopper), launch.name


def test_the_number_of_rows_compiles_no_kernel_of_the_pick_anew(gpu: FakeGpu) -> None:
    engine = _engine(_model())
    for count in (1, 2, 3, 6):
        for index in range(count):
            engine.submit(request(f"{count}-{index}", (1, 2, 3), max_tokens=2, top_p=0.9, top_k=5, min_p=0.1))
        _finish(engine)
    assert engine._graphs is not None
    assert len(engine._graphs) == 4
    made = [variant[0] for variant in gpu.variants]
    assert [made.count(name) for name in ("peak", "draw")] == [1, 1]
    assert (made.count("narrow"), made.count("weigh")) == (2, 2), "by number, by sum"


@pytest.mark.parametrize("trees", [(None,), (TREE,)], ids=str)
def test_kernel_by_kernel_with_a_switch_penalty(gpu: FakeGpu, trees: tuple[TreeShape | None, ...]) -> None:
    gpu.answer = TREE.max_nodes - 1  # nothing is shared
    engine = _engine(_model("fp8"), trees, fixed_shapes=False)
    penalty = SwitchPenalty(alpha=3.0, beta=9, tokens=(2, 3))
    for index, kind in enumerate([{"switch": penalty}, {"temperature": 0.0}, {"top_p": 0.5}]):
        engine.submit(dataclasses.replace(request(str(index), (1, 2, 3), max_tokens=4, **kind), logprobs=index == 1))
    _finish(engine)
    assert gpu.launched() >= STEP


@pytest.mark.parametrize(("precision", "dtype"), [("fp8", torch.bfloat16), slow("int8-sq", torch.float32)])
def test_without_triton(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, precision: Precision, dtype: torch.dtype
) -> None:
    """Plain torch on the device: its steps are captured as well."""
    monkeypatch.setenv(SWITCH, "0")
    engine = _engine(_model(precision, dtype=dtype), (TREE,), kv_dtype="fp8")
    _play(engine, KINDS[:2])
    assert engine._graphs is not None
    assert engine._graphs._captures
    assert gpu.launches == []


def test_a_14b_of_a_million_positions(gpu: FakeGpu) -> None:
    """Grids and offsets at the largest sizes: 64 rows, trees of 17 nodes, a vocabulary of 152,064."""
    spec = dataclasses.replace(shape_spec("14b"), layers=1, max_positions=1 << 20)
    engine = _engine(
        _model("int8-sq", spec, max_tokens=1 << 20), (TreeShape(beams=4, length=4),), rows=64, total_tokens=1 << 20,
        kv_blocks=70000,
    )  # fmt: skip
    for index in range(64):
        engine.submit(request(str(index), (index, 1, 2), max_tokens=6, top_p=0.9))
    _finish(engine)
    assert engine._graphs is not None
    assert engine._graphs._captures
    assert max(launch.grid[-1] for launch in gpu.launches if launch.name == "attend_split") == 64


@pytest.mark.parametrize("precision", ["fp8", "int4", *map(slow, ("bf16", "int8", "int8-sq"))])
def test_every_candidate_is_tried_within_a_graph(gpu: FakeGpu, precision: Precision) -> None:
    gpu.measures = True
    model = _model(precision)
    model.prepare(300)
    assert len(gpu.graphs) > 40
    assert all((graph.captured, graph.replays) == (1, 11) for graph in gpu.graphs)
    gpu.answer = 2
    launch.probe(CUDA)


def test_a_benchmark_point(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights made on the device, a filled cache, forced acceptance, the phases by themselves."""
    monkeypatch.setattr(gpu_points, "kernels_of", lambda work, *_, **__: work() and {})
    spec = _spec()
    weights = RandomWeights(spec=spec, precision="fp8", device=CUDA)
    model = DecoderModel(weights, device=CUDA, dtype=torch.bfloat16, max_tokens=1024)
    head = random_head(spec, device=CUDA, dtype=torch.bfloat16, vocabulary=64)
    copy = device_clock.copy_bandwidth(CUDA)
    plan = PointPlan(precision="fp8", rows=3, context=40, steps=3, kv_dtype="int8", shares=(0.9, 0.5), overlap=True)
    monkeypatch.setattr(gpu_points.StandingEngine, "step", TorchEngine.step)
    found = torch.no_grad()(inspect.unwrap(measure_point))(model, plan, copy, head)
    assert found["graphs"] > 0
    torch.no_grad()(inspect.unwrap(profile_point))(model, plan, found, head)
    assert found["phase_ms"].keys() == {"draft", "verify", "accept", "step", "host"}


def test_the_loss_of_a_head(gpu: FakeGpu) -> None:
    """Without its gradient: autograd wants a CUDA build even of fake tensors."""
    model = _model()
    samples = [Sample(problem=str(i), tokens=tuple(range(40 + i)), prompt=7) for i in range(3)]
    windows = [Window(sample=sample, start=0, end=len(sample.tokens)) for sample in samples]
    drafter = Drafter(DrafterConfig(hidden_size=256, vocab_size=512, exit_dim=512)).to(CUDA)
    with torch.no_grad():
        batch = draft_batch(model, windows)
        loss = draft_loss(
            drafter, batch, depth_weights=(1.0, 0.5), objective="kd", lm_head=torch.empty(512, 256, device=CUDA)
        )
    assert loss.total.device.type == "cuda"
    assert len(hits_by_depth(drafter, model, samples, depths=2, tokens=200)) == 4


@pytest.mark.parametrize("precision", ["int8-sq", "fp8", "int4"])
def test_calibrating_on_the_device(gpu: FakeGpu, precision: Precision) -> None:
    """Activations there, weights and the scales that are kept on the host."""
    spec, scheme = _spec(), scheme_named(precision)
    rows = [TextRow(tokens=tuple(range(30)), prompt_tokens=3), TextRow(tokens=tuple(range(9)))]
    calibrator = LayerwiseCalibrator(spec, scheme, rows, torch.empty(spec.vocab, spec.hidden), device=CUDA)
    parts = {
        name: [
            LinearWeights(weight=dense(torch.empty(spec.linear_shapes[part], dtype=torch.bfloat16))) for part in members
        ]
        for name, members in LINEAR_PARTS.items()
    }
    ones = torch.ones(spec.hidden)
    scales = calibrator.layer(0, Norms(input=ones, post=ones), parts)
    for name, members in parts.items():
        for linear in quantize_group(members, scheme, scales.groups[name]):
            tensors = (linear.weight.data, linear.weight.scale, linear.pre_scale, linear.input_scale)
            assert {tensor.device.type for tensor in tensors if tensor is not None} == {"cpu"}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Made before there is a GPU."""
    return tiny_engine_dir(tmp_path, dtype=torch.bfloat16)


def test_an_engine_directory(directory: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cache gets what is free once loading has given back its own, but for what the steps need beside it."""
    emptied: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: ((3 << 29) + (2 << 20) * len(emptied), 80 << 30))
    source = open_source(directory)
    with open_engine(directory, OpenOptions(device="cuda")) as engine:
        assert engine.stats().kv_blocks == (2 << 20) // kv_block_bytes(source.spec, "model", torch.bfloat16, 16)
        engine.submit(request("a", (1, 2, 3), max_tokens=4))
        while engine.has_work:
            engine.step()
    rows = [TextRow(tokens=tuple(range(30)), prompt_tokens=3)]
    measured = measure_quality(source, open_unified(directory), rows, device=CUDA, output_layer="int8")
    assert measured.tokens == 27


def test_graphs_and_steps_ahead_can_be_turned_off(
    directory: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For whoever looks for the cause of a wrong token or a slow step."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (4 << 30, 80 << 30))
    for captured, ahead in ((True, True), (True, False), (False, True)):
        options = OpenOptions(device="cuda", cuda_graphs=captured, overlap=ahead)
        with open_engine(directory, options) as engine:
            assert isinstance(engine, TorchEngine)
            assert (engine._graphs is not None, engine._overlap) == (captured, ahead)


def test_a_numbered_device_becomes_the_current_one(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton asks for that one, not for where the tensors lie."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_named("cuda:1") == torch.device("cuda", 1)
    assert chosen == [torch.device("cuda", 1)]
    with pytest.raises(UsageError, match="this machine has 2"):
        device_named("cuda:2")
