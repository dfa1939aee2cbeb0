"""The optional C++ kernels against their pure-torch definitions, and life without a compiler.

The first test with kernels compiles them, some forty seconds the first time on a machine.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.engines import random_prompts, request, run_all, tiny_engine_dir
from tests.examples import slow
from tests.runtime.logits import KINDS, adversarial_logits
from tests.runtime.native_here import need_kernels
from trtkit.checkpoint.unified import open_unified
from trtkit.decoder import Norms, PlainPointwise, rope_at
from trtkit.model_spec import ModelSpec, RopeSpec
from trtkit.runtime import sampling
from trtkit.runtime.api import SamplingParams
from trtkit.runtime.attention import VerifyBatch, attend_verify
from trtkit.runtime.kv_cache import KvCache
from trtkit.runtime.model import DecoderModel
from trtkit.runtime.native import kernels, loader
from trtkit.runtime.sampling import pick_plain, sampling_rows, uniforms
from trtkit.runtime.torch_engine import TorchEngine
from trtkit.runtime.torch_options import TorchLimits

CPU = torch.device("cpu")
TOLERANCE: dict[torch.dtype, dict[str, float]] = {
    torch.float32: {"rtol": 2e-6, "atol": 1e-6},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-2},
}


@pytest.fixture(autouse=True)
def _no_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(loader.SWITCH, raising=False)


# ---- without kernels ------------------------------------------------------------------------------------------------


def test_small_models_cuda_and_a_zero_switch_never_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    large = loader.WORTHWHILE_PARAMETERS
    assert loader.wanted(large, CPU, torch.bfloat16)
    assert not loader.wanted(large - 1, CPU, torch.bfloat16)
    assert not loader.wanted(large, torch.device("cuda"), torch.bfloat16)
    assert not loader.wanted(large, CPU, torch.float16)
    monkeypatch.setenv(loader.SWITCH, "1")
    assert loader.wanted(1, CPU, torch.float32)
    monkeypatch.setenv(loader.SWITCH, "0")
    assert not loader.wanted(large, CPU, torch.bfloat16)


@pytest.mark.parametrize("compiler", ["absent", "broken"])
def test_without_a_working_compiler_the_engine_runs_in_torch(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One debug line, no error, nothing left in the cache, and the tokens of the pure-torch path."""
    directory = tiny_engine_dir(tmp_path / "engine")
    plain = _tokens(_model(directory))
    monkeypatch.setenv(loader.SWITCH, "1")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "no-such-compiler" if compiler == "absent" else "false")
    if compiler == "absent":
        monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(loader, "load", loader.load.__wrapped__)
    with caplog.at_level("DEBUG", logger="trtkit"):
        model = _model(directory)
    assert not model.native
    assert [r.levelname for r in caplog.records if "no CPU kernels" in r.message] == ["DEBUG"]
    assert not list(tmp_path.glob("cache/**/*.so"))
    assert _tokens(model) == plain


def _model(directory: Path, dtype: torch.dtype = torch.float32) -> DecoderModel:
    return DecoderModel(open_unified(directory), device=CPU, dtype=dtype, max_tokens=320)


def _tokens(model: DecoderModel, **limits: Any) -> dict[str, list[int]]:
    """Greedy and sampled rows over prompts of several lengths, some longer than one tile of the attention kernel."""
    limits = {"rows": 16, "total_tokens": 300, "kv_blocks": 300, "block_size": 16, **limits}
    requests = [
        request(str(i), prompt, seed=i, max_tokens=24, temperature=i % 2)
        for i, prompt in enumerate(random_prompts(3, [1, 15, 16, 17, 40, 250, 262, 270]))
    ]
    return run_all(TorchEngine(model, TorchLimits(**limits)), requests)[0]


# ---- with kernels ---------------------------------------------------------------------------------------------------


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(loader.SWITCH, "1")
    need_kernels()
    monkeypatch.setattr(kernels, "_loaded", True)


def test_the_kernels_compile_here() -> None:
    """And from then on the tests below run, in this very run too: pytest keeps the file's order."""
    assert loader.load() or not loader.compiler_path()


SPEC = ModelSpec(
    family="qwen3", layers=1, hidden=200, heads=6, kv_heads=2, head_dim=64, intermediate=333, vocab=1000,
    rope=RopeSpec(theta=1e4), norm_eps=1e-6, qkv_bias=False, qk_norm=True, tied=True, max_positions=512,
    dtype="bfloat16",
)  # fmt: skip


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 200])
def test_pointwise_is_that_of_torch(dtype: torch.dtype, tokens: int) -> None:
    torch.manual_seed(tokens)
    plain, fast, close = PlainPointwise(), kernels.NativePointwise(), TOLERANCE[dtype]
    x, delta = (torch.randn(tokens, SPEC.hidden).mul(3).to(dtype) for _ in range(2))
    weight = torch.rand(SPEC.hidden) + 0.5
    torch.testing.assert_close(fast.norm(x, weight, 1e-6), plain.norm(x, weight, 1e-6), **close)
    expected = plain.add_norm(x, delta, weight, 1e-6)
    got = fast.add_norm(x.clone(), delta, weight, 1e-6)
    assert torch.equal(got[0], expected[0]), "the residual is rounded once, like torch's sum"
    torch.testing.assert_close(got[1], expected[1], **close)
    rope = rope_at(SPEC, torch.arange(tokens) * 3, dtype)
    qkv = torch.randn(tokens, 10 * 64).to(dtype)
    for norms in (Norms(input=weight, post=weight), Norms(input=weight, post=weight, q=weight[:64], k=weight[64:128])):
        for ours, theirs in zip(
            fast.heads(SPEC, norms, qkv.clone(), rope), plain.heads(SPEC, norms, qkv, rope), strict=True
        ):
            torch.testing.assert_close(ours, theirs, **close)
    gate_up = torch.randn(tokens, 2 * SPEC.intermediate).mul(5).to(dtype)
    gate_up[0, :4], gate_up[0, 4] = torch.tensor([-200.0, -90.0, 90.0, 0.0]), torch.nan
    ours, theirs = fast.gated(gate_up), plain.gated(gate_up)
    torch.testing.assert_close(ours, theirs, equal_nan=True, **close)
    assert not ours[0, :4].isnan().any()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    """Rows of several lengths, blocks in any order, random trees; what nobody may read is noise too."""

    rows: int
    nodes: int
    longest: int
    dtype: torch.dtype
    group: int
    dim: int
    seed: int = 0
    kv_heads = 2
    size = 16

    def batch(self) -> VerifyBatch:
        torch.manual_seed(self.seed)
        width, size, nodes = self.width, self.size, self.nodes
        cached = torch.randint(0, self.longest + 1, (self.rows,))
        table = torch.randperm(self.rows * width + 3)[: self.rows * width].view(self.rows, width)
        places = cached[:, None] + torch.arange(nodes)
        tree = torch.rand(self.rows, nodes, nodes).lt(0.5).tril() | torch.eye(nodes, dtype=torch.bool)
        hidden = (torch.arange(width * size) >= cached[:, None])[:, None].repeat(1, nodes, 1)
        hidden.scatter_(2, places[:, None].expand(-1, nodes, -1), ~tree)
        return VerifyBatch(
            rows=self.rows, nodes=nodes, blocks=table.flatten(), hidden_slots=hidden, native=True,
            slots=(table.gather(1, places // size) * size + places % size).flatten(),
        )  # fmt: skip

    @property
    def width(self) -> int:
        return -(-(self.longest + self.nodes) // self.size)

    def qkv(self) -> Tensor:
        return torch.randn(self.rows * self.nodes, self.group * 2 + 4, self.dim).mul(2).to(self.dtype)

    def split(self, qkv: Tensor) -> list[Tensor]:
        return list(qkv.split([qkv.shape[1] - 4, 2, 2], dim=1))

    def cache(self) -> KvCache:
        spec = dataclasses.replace(SPEC, heads=2 * self.group, head_dim=self.dim)
        cache = KvCache(
            spec, blocks=self.rows * self.width + 3, block_size=self.size, max_rows=self.rows,
            max_tokens=self.width * self.size, kv_dtype="model", dtype=self.dtype, device=CPU,
        )  # fmt: skip
        torch.manual_seed(self.seed + 1)
        for pool in cache.pools(0):
            pool.normal_()
        return cache


@pytest.mark.usefixtures("native")
@settings(max_examples=60)
@given(
    case=st.builds(
        Attention,
        seed=st.integers(0, 10**6),
        rows=st.integers(1, 5),
        nodes=st.sampled_from([1, 2, 4, 9]),
        longest=st.sampled_from([0, 3, 16, 255, 256, 300, 600]),
        dtype=st.sampled_from(list(TOLERANCE)),
        group=st.sampled_from([1, 3, 7]),
        dim=st.sampled_from([32, 48, 64, 96, 128]),  # 48: what bf16 kernels in steps of 32 do not take
    )
)
def test_attention_is_that_of_torch(case: Attention) -> None:
    batch = case.batch()
    plain = dataclasses.replace(batch, native=False)
    qkv = case.split(case.qkv())
    cache, other, exact = case.cache(), case.cache(), dataclasses.replace(case, dtype=torch.float32).cache()
    for wide, stored in zip(exact.pools(0), cache.pools(0), strict=True):
        wide.copy_(stored)
    result = attend_verify(cache, 0, batch, *qkv)
    attend_verify(other, 0, plain, *qkv)
    assert all(map(torch.equal, cache.pools(0), other.pools(0))), "the same keys and values are written"
    # In bf16 torch itself is further off than this from what its own arithmetic gives in float32.
    close = {"rtol": 1e-5, "atol": 1e-5} if case.dtype == torch.float32 else {"rtol": 2e-2, "atol": 3e-2}
    torch.testing.assert_close(result.float(), attend_verify(exact, 0, plain, *(part.float() for part in qkv)), **close)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dim", [48, 64, 128])
def test_attention_does_not_depend_on_the_company(dim: int, dtype: torch.dtype) -> None:
    """Bit for bit: a node without the others of its tree, a row alone, fewer query heads, one thread or two."""
    case = Attention(rows=3, nodes=5, longest=600, dtype=dtype, group=7, dim=dim)
    batch, cache, qkv = case.batch(), case.cache(), case.qkv()
    heads = 2 * case.group
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        whole = attend_verify(cache, 0, batch, *case.split(qkv)).view(case.rows, case.nodes, 2, case.group, dim)
    finally:
        torch.set_num_threads(threads)
    tables, slots = batch.blocks.view(case.rows, -1), batch.slots.view(case.rows, -1)
    for row in range(case.rows):
        for nodes in (slice(0, 1), slice(3, 4), slice(0, 2), slice(0, 5)):
            alone = VerifyBatch(
                rows=1, nodes=nodes.stop - nodes.start, blocks=tables[row], slots=slots[row, nodes],
                hidden_slots=batch.hidden_slots[row : row + 1, nodes].contiguous(), native=True,
            )  # fmt: skip
            mine = qkv.view(case.rows, case.nodes, -1, dim)[row, nodes]
            for group in (1, 2, 6, 7):
                q = mine[:, :heads].view(-1, 2, case.group, dim)[:, :, :group].reshape(-1, 2 * group, dim)
                parts = case.split(torch.cat([q, mine[:, heads:]], dim=1))
                out = attend_verify(cache, 0, alone, *parts).view(-1, 2, group, dim)
                assert torch.equal(out, whole[row, nodes, :, :group]), (row, nodes, group)


@pytest.mark.usefixtures("native")
@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    vocab=st.sampled_from([1, 17, 128, 1000, 5003]),
    kind=st.sampled_from(KINDS),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 0, 1, 5, 300, 4000]),
    top_p=st.sampled_from([1.0, 1.0, 0.9, 0.5, 0.999999, 1e-6]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 1e-9, 1.0]),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_picks_are_those_of_torch(
    seed: int, vocab: int, kind: str, temperature: float, top_k: int, top_p: float, min_p: float, dtype: torch.dtype
) -> None:
    """Bit for bit: mixed parameters, all kinds of logits, and the two ends of the uniform interval."""
    logits = adversarial_logits(kind, 40, vocab, seed).to(dtype)
    cut = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    rows = sampling_rows([cut if i % 3 else SamplingParams() for i in range(40)], range(seed, seed + 40), CPU)
    positions = torch.arange(40)
    assert torch.equal(sampling.pick(logits, rows, positions), pick_plain(logits, rows, positions))
    few, nodes = sampling_rows([cut, SamplingParams()] * 5, range(seed, seed + 10), CPU), positions + seed
    assert torch.equal(sampling.pick(logits, few, nodes), pick_plain(logits, few.repeat(4), nodes)), "nodes of a row"
    uniform = uniforms(rows.seeds, positions)
    uniform[::4], uniform[1::4] = 0.0, 1 - 2.0**-53
    expected = sampling.invert_cdf(sampling.sampling_weights(logits, rows), uniform)
    warm = torch.zeros(40, dtype=torch.bool)
    got = kernels.draw_tokens(logits, rows.temperature, warm, uniform, rows.top_k, rows.top_p, rows.min_p)
    assert torch.equal(got, expected)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_weights_are_those_of_torch_to_the_last_unit(temperature: float) -> None:
    """Two tokens, and the two neighbouring uniform numbers between which the draw changes from one to the other: a
    weight that is one unit off moves that place."""
    count = 20_000
    logits = torch.stack([torch.zeros(count), -torch.rand(count) * 27 * temperature], dim=1)
    rows = sampling_rows([SamplingParams(temperature=temperature)] * count, [0] * count, CPU)
    weights = sampling.sampling_weights(logits, rows)
    first, total = weights[:, 0], weights.sum(dim=1).double()
    above = first / total
    for _ in range(3):
        above = torch.where((above * total).long() < first, above.nextafter(torch.tensor(1.0).double()), above)
    below = above
    for _ in range(6):
        below = torch.where((below * total).long() >= first, below.nextafter(torch.tensor(0.0).double()), below)
    for uniform, token in ((above, 1), (below, 0)):
        got = kernels.draw_tokens(logits, rows.temperature, rows.cold, uniform, rows.top_k, rows.top_p, rows.min_p)
        assert (got == token).all()


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_engine_tokens_are_those_of_torch(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32, greedy and sampled; the kernels also serve a cache whose blocks they do not fit, by leaving it alone."""
    directory = tiny_engine_dir(tmp_path, family)
    fast = _model(directory)
    monkeypatch.setenv(loader.SWITCH, "0")
    plain = _model(directory)
    assert (fast.native, plain.native) == (True, False)
    expected = _tokens(plain)
    assert _tokens(fast) == expected
    assert _tokens(fast, block_size=8, kv_blocks=600) == expected


Alone: TypeAlias = tuple[DecoderModel, dict[str, list[int]]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """A model with kernels, and what its rows say one after the other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(loader.SWITCH, "1")
        need_kernels()
        model = _model(tiny_engine_dir(tmp_path_factory.mktemp("native")))
        assert model.native
        return model, _tokens(model, rows=1)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(
    ("rows", "blocks", "threads"),
    [(8, 300, 2), (8, 40, 1), (3, 300, 1), slow(5, 40, 2), slow(2, 40, 1), slow(7, 300, 1), slow(1, 40, 2)],
)
def test_tokens_do_not_depend_on_the_batch(alone: Alone, rows: int, blocks: int, threads: int) -> None:
    """As without the kernels: batch size, preemption and threads change no token."""
    model, expected = alone
    torch.set_num_threads(threads)
    try:
        assert _tokens(model, rows=rows, kv_blocks=blocks) == expected
    finally:
        torch.set_num_threads(1)
