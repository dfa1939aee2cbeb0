"""How sampling parameters are said to TensorRT-LLM, and which are refused because it would ignore them."""

from __future__ import annotations

import pytest

from trtkit.errors import UsageError
from trtkit.runtime.api import SamplingParams, SwitchPenalty
from trtkit.runtime.trtllm_sampling import COLD, EngineKind, check_sampling, executor_sampling

PLAIN = EngineKind(redrafter=False, greedy=False)
SAMPLING = EngineKind(redrafter=True, greedy=False)
GREEDY = EngineKind(redrafter=True, greedy=True)


def test_sampling_is_said_so_that_the_executor_samples() -> None:
    # Without top_k and top_p the executor would decode greedily.
    assert executor_sampling(SamplingParams(temperature=0.7), 5, PLAIN) == {
        "seed": 5, "temperature": 0.7, "top_k": 0, "top_p": 1.0,
    }  # fmt: skip
    assert executor_sampling(SamplingParams(top_p=0.9, min_p=0.05), 5, PLAIN)["min_p"] == 0.05
    assert executor_sampling(SamplingParams(temperature=0), 5, PLAIN) == {"seed": 5, "top_k": 1}
    assert executor_sampling(SamplingParams(temperature=0), 5, SAMPLING) == {"seed": 5, "temperature": COLD}
    assert executor_sampling(SamplingParams(temperature=0), -1, GREEDY) == {"seed": (1 << 64) - 1}


@pytest.mark.parametrize(
    ("sampling", "kind", "offenders"),
    [
        (SamplingParams(top_p=0.9, top_k=5, min_p=0.1), PLAIN, 0),
        (SamplingParams(temperature=0.6), SAMPLING, 0),
        (SamplingParams(top_p=0.9, top_k=5, min_p=0.1), SAMPLING, 3),
        (SamplingParams(temperature=0), GREEDY, 0),
        (SamplingParams(temperature=1, min_p=0.1), GREEDY, 2),
    ],
)
def test_what_a_redrafter_engine_cannot_do_is_refused(
    sampling: SamplingParams, kind: EngineKind, offenders: int
) -> None:
    if not offenders:
        return check_sampling(sampling, kind)
    with pytest.raises(UsageError) as caught:
        check_sampling(sampling, kind)
    assert len(caught.value.offenders) == offenders
    assert "--top-p 1 --top-k 0 --min-p 0" in (caught.value.hint or "")
    return None


def test_a_top_k_that_the_kernel_would_cut_down_is_refused() -> None:
    """``setup_topk_runtime_args`` in layers/topKSamplingLayer.cu takes 1024 for anything above it."""
    check_sampling(SamplingParams(top_k=1024), PLAIN)
    with pytest.raises(UsageError, match="no more than 1024"):
        check_sampling(SamplingParams(top_k=1025), PLAIN)


def test_log_probabilities_are_refused_everywhere() -> None:
    with pytest.raises(UsageError, match="no log-probabilities"):
        check_sampling(SamplingParams(), PLAIN, logprobs=True)


def test_thought_penalties_are_refused_everywhere() -> None:
    with pytest.raises(UsageError, match="thought switches"):
        check_sampling(SamplingParams(switch=SwitchPenalty(alpha=3, beta=600, tokens=(1,))), PLAIN)
