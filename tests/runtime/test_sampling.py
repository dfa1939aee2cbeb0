"""The sampling distribution and its picks, against transformers' warpers, exact frequencies and brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.reference.sampling import keep, scan
from trtkit.errors import RequestError
from trtkit.runtime import sampling
from trtkit.runtime.api import SamplingParams
from trtkit.runtime.cuda import kernels
from trtkit.runtime.native.loader import SWITCH
from trtkit.runtime.sampling import LARGEST_WEIGHT, invert_cdf, pick, sampling_rows, sampling_weights, uniforms

CPU = torch.device("cpu")

PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0.6),
    SamplingParams(temperature=1.3, top_k=7),
    SamplingParams(top_p=0.8),
    SamplingParams(temperature=0.7, top_p=0.95, min_p=0.05),
    SamplingParams(top_k=50, top_p=0.5, min_p=0.01),
    SamplingParams(top_p=0.01),
]


def _transformers_distribution(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    ids = torch.zeros(logits.shape[0], 1, dtype=torch.long)
    warped = TemperatureLogitsWarper(params.temperature)(ids, logits) if params.temperature != 1 else logits
    if params.top_k:
        warped = TopKLogitsWarper(params.top_k)(ids, warped)
    if params.top_p < 1:
        warped = TopPLogitsWarper(params.top_p)(ids, warped)
    if params.min_p:
        warped = MinPLogitsWarper(params.min_p)(ids, warped)
    return warped.softmax(dim=-1)


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_distribution_is_that_of_transformers(params: SamplingParams) -> None:
    logits = torch.randn(5, 1000) * 3
    ours = sampling_weights(logits, sampling_rows([params] * 5, range(5), CPU))
    ours = (ours.double() / ours.sum(dim=1, keepdim=True)).float()
    torch.testing.assert_close(ours, _transformers_distribution(logits, params), rtol=1e-5, atol=1e-9)


def _weights_at(x: torch.Tensor) -> torch.Tensor:
    """The weights of logits x below a largest logit of 0."""
    rows = sampling_rows([SamplingParams()], [0], CPU)
    return sampling_weights(torch.cat([torch.zeros(1), x])[None], rows)[0, 1:]


def test_weights_are_the_exponential_within_the_stated_bound() -> None:
    x = torch.cat([torch.linspace(-45, 0, 300_001), -torch.logspace(-30, 1.5, 10_001), torch.tensor([-torch.inf])])
    exact = x.double().exp() * LARGEST_WEIGHT
    weights = _weights_at(x)
    assert ((weights - exact).abs() <= 1 + exact * 2**-23.5).all()
    assert _weights_at(torch.zeros(1)).item() == LARGEST_WEIGHT
    assert (weights[x < -27.8] == 0).all()


def test_a_smaller_logit_never_has_a_larger_weight() -> None:
    """Runs of 2^16 neighbouring float32 numbers in every part of the range; all of them in the slow test."""
    for bits in range(0x2F000000, 0x42200000, 0x00410000):
        _check_falling(bits, 1 << 16)


@pytest.mark.slow
def test_no_smaller_logit_at_all_has_a_larger_weight() -> None:
    """Every float32 from -2^-33 to -32."""
    for bits in range(0x2F000000, 0x42000000, 1 << 21):
        _check_falling(bits, 1 << 21)


def _check_falling(first: int, count: int) -> None:
    x = -torch.arange(first - 1, first + count, dtype=torch.int32).view(torch.float32)
    assert (_weights_at(x).diff() <= 0).all()


@given(
    st.lists(st.sampled_from([0.0, 1.0, 1.0, 1.25, -3.0, 4.5, -60.0, -torch.inf]), min_size=1, max_size=40),
    st.integers(0, 45),
    st.sampled_from([1.0, 0.9999999, 0.9, 0.5, 1e-9]),
    st.sampled_from([0.0, 1e-13, 0.05, 0.3, 1.0]),
)
def test_cuts_are_those_of_a_sort(logits: list[float], top_k: int, top_p: float, min_p: float) -> None:
    """In a batch with an uncut row, whose weights are the reference's start."""
    logits.append(0.5)
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p)
    cut, whole = sampling_weights(
        torch.tensor([logits, logits]), sampling_rows([params, SamplingParams()], [0, 0], CPU)
    ).tolist()
    assert cut == keep(whole, params)
    assert max(cut) == LARGEST_WEIGHT


def test_cuts_reach_far_into_a_wide_flat_distribution() -> None:
    """Rows that need a few, some hundreds and nearly all of 5000 tokens that are about equally likely."""
    cuts = [
        SamplingParams(top_p=0.001), SamplingParams(top_p=0.3), SamplingParams(top_p=0.98), SamplingParams(top_k=300),
        SamplingParams(top_k=2048), SamplingParams(top_k=4999, top_p=0.99), SamplingParams(),
    ]  # fmt: skip
    logits = (torch.randn(5000) * 0.1).expand(len(cuts), -1)
    *found, whole = sampling_weights(logits, sampling_rows(cuts, [0] * len(cuts), CPU)).tolist()
    for params, weights in zip(cuts, found, strict=False):
        alone = sampling_weights(logits[:1], sampling_rows([params], [0], CPU))
        assert alone[0].tolist() == weights == keep(whole, params)


def test_a_row_does_not_see_its_neighbours() -> None:
    """Mixed parameters in one batch give each row what it would get alone."""
    logits = torch.randn(len(PARAMS), 300) * 2
    params = [*PARAMS[:-1], SamplingParams(temperature=0)]
    seeds = [11 * i for i in range(len(params))]
    positions = torch.arange(len(params)) + 5
    together = pick(logits, sampling_rows(params, seeds, CPU), positions)
    for i, param in enumerate(params):
        alone = pick(logits[i : i + 1], sampling_rows([param], [seeds[i]], CPU), positions[i : i + 1])
        assert together[i] == alone[0]


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**31))
def test_uniforms_match_a_plain_integer_version(seed: int, position: int) -> None:
    mask = (1 << 64) - 1

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    golden = 0x9E3779B97F4A7C15
    wanted = (mix((mix((seed + golden) & mask) + position * golden) & mask) >> 11) / 2**53
    rows = sampling_rows([SamplingParams()], [seed], CPU)
    assert uniforms(rows.seeds, torch.tensor([position])).item() == wanted


def test_uniforms_are_uniform_and_uncorrelated() -> None:
    count = 40_000
    along = uniforms(torch.full((count,), 7), torch.arange(count))
    across = uniforms(torch.arange(count), torch.full((count,), 7))
    for sample in (along, across):
        histogram = torch.histc(sample.float(), bins=20, min=0, max=1)
        chi_square = ((histogram - count / 20) ** 2 / (count / 20)).sum()
        assert chi_square < 43.8, "19 degrees of freedom, p < 0.001"
        assert abs(torch.corrcoef(torch.stack([sample[:-1], sample[1:]]))[0, 1]) < 0.02


@given(st.lists(st.sampled_from([0, 1, 7, 1 << 22, LARGEST_WEIGHT]), max_size=400), st.floats(0, 1, exclude_max=True))
def test_inverse_cdf_is_a_scan(weights: list[int], uniform: float) -> None:
    weights.append(3)
    found = int(invert_cdf(torch.tensor([weights]), torch.tensor([uniform], dtype=torch.float64))[0])
    assert found == scan(weights, uniform)
    assert weights[found] > 0


def test_shares_of_the_unit_interval_are_the_probabilities() -> None:
    """Enumerated: a token is drawn by exactly those of 2^12 even steps that its share of the sum contains."""
    logits = torch.tensor([[0.0, -1.0, -torch.inf, -0.25, -9.0]])
    weights = sampling_weights(logits, sampling_rows([SamplingParams()], [0], CPU))
    steps = 1 << 12
    uniform = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    counts = invert_cdf(weights.expand(steps, -1), uniform).bincount(minlength=5)
    assert ((counts / steps - logits[0].double().softmax(0)).abs() <= 1 / steps).all()
    assert counts[2] == 0


def test_frequencies_follow_the_distribution() -> None:
    """Chi-square over a tiny vocabulary: 20,000 draws with different seeds at one position."""
    logits = torch.tensor([[0.5, -1.0, 2.0, 0.0, 1.0]])
    count = 20_000
    rows = sampling_rows([SamplingParams(temperature=0.8)] * count, range(count), CPU)
    drawn = pick(logits.expand(count, -1), rows, torch.full((count,), 3))
    expected = (logits[0] / 0.8).softmax(0) * count
    chi_square = ((torch.bincount(drawn, minlength=5) - expected) ** 2 / expected).sum()
    assert chi_square < 18.5, "4 degrees of freedom, p < 0.001"


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-40, 1e-9, 1e-6])
def test_next_to_temperature_zero_the_most_likely_token_is_drawn(temperature: float) -> None:
    logits = torch.randn(50, 300) * 20
    rows = sampling_rows([SamplingParams(temperature=temperature)] * 50, range(50), CPU)
    assert pick(logits, rows, torch.arange(50)).equal(logits.argmax(dim=1))


def test_temperature_zero_takes_the_lowest_of_tied_maxima() -> None:
    rows = sampling_rows([SamplingParams(temperature=0)], [1], CPU)
    assert pick(torch.tensor([[0.0, 3.0, 3.0, 1.0]]), rows, torch.tensor([0])).tolist() == [1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_distribution_give_token_0(temperature: float) -> None:
    """And leave their neighbours alone."""
    logits = torch.zeros(4, 300)
    logits[:3, 5], logits[3, 7] = 2.0, 50.0
    logits[0, 7], logits[1], logits[2, 9] = torch.nan, -torch.inf, torch.inf
    rows = sampling_rows([SamplingParams(temperature=temperature)] * 4, range(4), CPU)
    picks = pick(logits, rows, torch.arange(4)).tolist()
    assert picks == [0, 0, 9 if temperature == 0 else 0, 7]


def test_the_gpu_kernels_run_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "triton" else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(kernels, "_compiles", lambda device: True)
    runs = sampling._triton_runs.__wrapped__
    assert runs(cuda, torch.bfloat16)
    assert not runs(CPU, torch.bfloat16)
    assert not runs(cuda, torch.float64)
    monkeypatch.setenv(SWITCH, "0")
    assert not runs(cuda, torch.bfloat16)


def test_parameters_out_of_range_are_listed_together() -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(temperature=-1, top_p=0, min_p=2)
    assert len(caught.value.offenders) == 3
