from __future__ import annotations

import itertools
import random
import statistics
from collections import Counter
from pathlib import Path

import pytest

from tests.report.run_dirs import attempt, solution, write_run
from trtkit.report.figures import figures_of, majority_curve
from trtkit.report.read import read_runs
from trtkit.report.records import Result, Sample, VoteCount

GOLD = "7"


def result(boxes: list[str | None], tokens: list[int], name: str = "p") -> Result:
    """A problem whose right answer is 7."""
    answers = [answer for answer, _ in Counter(box for box in boxes if box is not None).most_common()]
    samples = tuple(
        Sample(
            index=index,
            variant="solve",
            tokens=length,
            ending="stop",
            box=box,
            vote=None if box is None else answers.index(box),
            correct=box == GOLD,
            seconds=1.0,
            ended=1.0,
        )
        for index, (box, length) in enumerate(zip(boxes, tokens, strict=True))
    )
    votes = tuple(VoteCount(answer=text, count=boxes.count(text), correct=text == GOLD) for text in answers)
    return Result(
        id=name, text=None, gold=GOLD, answer=None, correct=False, settled=True, votes=votes, samples=samples,
        asked=len(boxes), tokens=sum(tokens), seconds=1.0, ended=1.0,
    )  # fmt: skip


def voted(samples: tuple[Sample, ...]) -> bool:
    """The plain majority, spelled out: most votes, a tie to the sample with the fewest tokens."""
    counts = Counter(sample.box for sample in samples if sample.box is not None)
    if not counts:
        return False
    most = max(counts.values())
    tied = {answer for answer, count in counts.items() if count == most}
    earliest = min((s for s in samples if s.box in tied), key=lambda sample: (sample.tokens, sample.index))
    return earliest.box == GOLD


def brute_force(one: Result, k: int) -> float:
    subsets = list(itertools.combinations(one.samples, min(k, len(one.samples))))
    return sum(map(voted, subsets)) / len(subsets)


def random_result(seed: int, count: int) -> Result:
    rng = random.Random(seed)
    boxes = [rng.choice(["7", "7", "8", "9", None]) for _ in range(count)]
    return result(boxes, [rng.randint(1, 5) for _ in range(count)])  # many equal lengths


@pytest.mark.parametrize("seed", range(8))
def test_maj_at_k_is_what_all_subsets_give(seed: int) -> None:
    problems = [random_result(seed, 9), random_result(seed + 100, 6), random_result(seed + 200, 1)]
    curve = majority_curve(problems)
    assert len(curve) == 9
    for k, estimate in enumerate(curve, start=1):
        exact = [brute_force(one, k) for one in problems]
        assert estimate.value == pytest.approx(statistics.mean(exact))
        assert estimate.error == pytest.approx(statistics.stdev(exact) / 3**0.5)


@pytest.mark.parametrize("seed", range(3))
def test_drawn_subsets_agree_with_all_of_them(seed: int) -> None:
    one = random_result(seed, 14)  # more than are enumerated
    curve = [estimate.value for estimate in majority_curve([one])]
    assert curve[0] == pytest.approx(brute_force(one, 1))
    assert curve[-1] == brute_force(one, 14)
    for k in (2, 3, 7, 13):
        assert curve[k - 1] == pytest.approx(brute_force(one, k), abs=0.05)  # 4.5 standard errors of 2,000 draws
    assert curve == [estimate.value for estimate in majority_curve([one])]  # seeded


def test_problems_without_samples_or_answers_are_wrong() -> None:
    nothing, blanks = result([], []), result([None, None], [1, 2])
    assert [estimate.value for estimate in majority_curve([nothing, blanks, result(["7"], [1])])] == pytest.approx(
        [1 / 3, 1 / 3]
    )
    assert majority_curve([]) == ()


def test_rates_totals_and_standard_errors(tmp_path: Path) -> None:
    problems = [{"id": name, "problem": "x", "answer": "7"} for name in "abc"]
    rows = [
        attempt("a", 0, "7", 10, ending="think"),
        attempt("a", 1, "7", 20, ending="think"),
        attempt("a", 2, None, 100, finish="length", ending="length"),
        attempt("a", 3, "8", 100, finish="length", ending="length", forced=True),
        solution("a", "7", 230, share=3.0, bank=5.0, cancelled=0),
        attempt("b", 0, None, 40, ending="loop", clock=2.0),
        attempt("b", 1, "9", 10, ending="think", clock=2.0),
        solution("b", "9", 80, stopped_early="agree(1)", cancelled=2, clock=2.0, share=3.0, bank=6.5),
        solution("c", None, 0, error="too long", clock=2.0, cancelled=0),
        {
            "kind": "stats", "new_tokens": 300, "row_steps": 150, "accepted_by_depth": [90, 30],
            "seconds": {"verify": 1.5, "draft": 0.5}, "clock": 2.0,
        },
    ]  # fmt: skip
    (run,) = read_runs([write_run(tmp_path / "run", problems, rows)])
    figures = figures_of(run)
    assert (figures.problems, figures.settled, figures.answered, figures.graded, figures.correct) == (3, 3, 2, 3, 1)
    assert figures.accuracy is not None
    assert figures.accuracy.value == pytest.approx(1 / 3)
    assert figures.accuracy.error == pytest.approx(statistics.stdev([1, 0, 0]) / 3**0.5)
    assert figures.pass_at_1 is not None
    assert figures.pass_at_1.value == pytest.approx((2 / 4 + 0 + 0) / 3)
    assert figures.pass_at_1.error == pytest.approx(statistics.stdev([0.5, 0, 0]) / 3**0.5)
    assert figures.samples == 6
    assert figures.blank_rate == pytest.approx(2 / 6)
    assert (figures.truncated_rate, figures.forced_rate, figures.looped_rate) == pytest.approx((1 / 6,) * 3)
    assert (figures.cancelled, figures.stopped_early) == (2, 1)
    assert (figures.tokens, figures.cancelled_tokens) == (310, 30)
    lengths = [10, 20, 100, 100, 40, 10]
    assert figures.tokens_median == statistics.median(lengths)
    assert figures.tokens_p90 == pytest.approx(statistics.quantiles(lengths, n=10, method="inclusive")[-1])
    assert figures.tokens_per_second == pytest.approx(310 / 2.0)
    assert figures.tokens_per_step == 2.0
    assert figures.accepted_by_depth == pytest.approx((0.6, 0.2))
    assert dict(figures.phase_seconds) == {"verify": 1.5, "draft": 0.5}
    assert figures.bank == ((1.0, 5.0), (2.0, 6.5))


def test_rates_are_of_settled_problems_and_tokens_of_all_work(tmp_path: Path) -> None:
    problems = [{"id": name, "problem": "x", "answer": "7"} for name in "ab"]
    rows = [attempt("a", 0, "7", 10), solution("a", "7", 10), attempt("b", 0, None, 30, clock=4.0)]
    (run,) = read_runs([write_run(tmp_path / "run", problems, rows)])
    figures = figures_of(run)
    assert (figures.samples, figures.blank_rate) == (1, 0.0)
    assert (figures.tokens, figures.tokens_per_second) == (40, 10.0)


def test_speed_over_time_adds_up_to_all_tokens(tmp_path: Path) -> None:
    rows = [attempt("a", n, "7", 10 * n, seconds=0.5 + n / 10, clock=3.0 + n / 10) for n in range(20)]
    rows.append(solution("a", "7", 4000, seconds=3.0, clock=5.0))  # 2,100 of them of cancelled samples
    rows.append({"kind": "session"})
    rows.append(attempt("b", 0, "7", 500, seconds=2.0, clock=2.0))
    (run,) = read_runs([write_run(tmp_path / "run", [{"id": "a", "problem": "x"}, {"id": "b", "problem": "x"}], rows)])
    assert run.seconds == 7.0
    speed = figures_of(run).speed
    width = 7.0 / len(speed)
    assert sum(tokens * width for _, tokens in speed) == pytest.approx(4500)
    assert speed[0][1] == 0  # nothing was at work in the first half second
    assert speed[-1][1] == pytest.approx(250)  # the second session: 500 tokens in 2 seconds
