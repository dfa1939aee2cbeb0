"""The pick on a GPU against plain torch, bit for bit: in Triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tests.runtime.cuda.interpreting import correct_numerics
from tests.runtime.logits import KINDS, adversarial_logits
from trtkit.runtime.api import SamplingParams
from trtkit.runtime.cuda.sampling import draw_tokens
from trtkit.runtime.sampling import SamplingRows, pick, pick_plain, sampling_rows, uniforms

MIXED = [
    SamplingParams(),
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.7, top_p=0.9, min_p=0.05),
    SamplingParams(temperature=1.3, top_k=7),
    SamplingParams(top_k=40, top_p=0.5),
    SamplingParams(top_p=1e-9),
    SamplingParams(min_p=0.3, top_k=1000),
    SamplingParams(top_p=0.999999),
]


@pytest.fixture(autouse=True)
def _numerics(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        correct_numerics(monkeypatch)


def rows_of(params: list[SamplingParams], device: torch.device, seed: int = 0) -> SamplingRows:
    return sampling_rows(params, [seed * 7919 + (1 << 63) + i for i in range(len(params))], device)


def same(logits: Tensor, params: list[SamplingParams], seed: int, chunk: int) -> None:
    """Against the definition on the CPU, whatever the device."""
    positions = torch.arange(len(params)) * 3 + seed
    found = draw_tokens(logits, rows_of(params, logits.device, seed), positions.to(logits.device), chunk)
    expected = pick_plain(logits.cpu(), rows_of(params, torch.device("cpu"), seed), positions)
    assert found.tolist() == expected.tolist()


@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_all_kinds_in_one_batch(dtype: torch.dtype, device: torch.device) -> None:
    """Each kind of logits with another mixture of cuts."""
    seed = int(dtype == torch.float32)
    logits = torch.cat([adversarial_logits(kind, 1, 150, seed) for kind in KINDS])
    params = [MIXED[(i + 3 * seed) % len(MIXED)] for i in range(len(KINDS))]
    same(logits.to(device, dtype), params, seed, chunk=128)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_all_kinds_of_logits_with_all_cuts(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    for seed, vocab in enumerate((700, 130, 64, 1)):
        logits = adversarial_logits(kind, len(MIXED), vocab, seed).to(device, dtype)
        same(logits, MIXED, seed, chunk=128)


@pytest.mark.parametrize("param", MIXED, ids=str)
def test_each_cut_alone(param: SamplingParams, device: torch.device) -> None:
    """Only the launches that it needs; and a view of wider rows."""
    logits = adversarial_logits("normal", 2, 300, 3).to(device)[:, :257]
    same(logits, [param] * 2, 3, chunk=256)


def test_flat_logits_follow_the_noise_alone(device: torch.device) -> None:
    logits = torch.zeros(3, 128, device=device)
    rows = sampling_rows([SamplingParams()] * 3, [5, 2**64 - 1, 1 << 63], device)
    positions = torch.tensor([0, 7, 2**31], device=device)
    expected = (uniforms(rows.seeds, positions) * 128).long()
    assert draw_tokens(logits, rows, positions, 128).tolist() == expected.tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_vocabulary_in_a_graph(kind: str) -> None:
    """151,936 tokens, captured: nothing may wait for the device; a replay reads new logits."""
    cuda = torch.device("cuda")
    params = MIXED * 4
    rows, cold = rows_of(params, cuda), rows_of(params, torch.device("cpu"))
    positions = torch.arange(len(params), device=cuda)
    held = torch.zeros(len(params), 151_936, dtype=torch.bfloat16, device=cuda)
    pick(held, rows, positions)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = pick(held, rows, positions)
    for seed in range(3):
        logits = adversarial_logits(kind, len(params), 151_936, seed).bfloat16()
        held.copy_(logits)
        graph.replay()
        assert out.tolist() == pick_plain(logits, cold, positions.cpu()).tolist()
