"""Stop rules on hand-made sequences, and their error levels against enumeration and simulation."""

from __future__ import annotations

import math
import random
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtkit.errors import UsageError
from trtkit.solve.answers import Answer, AnswerMode, read_answer
from trtkit.solve.stopping import (
    StopRule,
    certificate_wealth,
    first_to_hold,
    leader_probability,
    parse_rule,
    parse_rules,
)
from trtkit.solve.vote import Tally, Weighting

ANSWERS = {text: read_answer(text, AnswerMode()) for text in "abcd"}


def never(one: Answer, other: Answer) -> bool:
    return False


def after(tally: Tally, letter: str) -> Tally:
    """One more sample; ``-`` is one without an answer."""
    number = tally.finished
    return tally.add(ANSWERS.get(letter), tokens=10 + number, index=number, same=never)


def tally_of(letters: str, weighting: Weighting | None = None) -> Tally:
    tally = Tally(weighting=weighting or Weighting())
    for letter in letters:
        tally = after(tally, letter)
    return tally


def stops_after(rule: StopRule, letters: str, total: int = 32) -> int | None:
    """After how many samples the rule first holds."""
    for count in range(1, len(letters) + 1):
        if rule.holds(tally_of(letters[:count]), total - count):
            return count
    return None


@pytest.mark.parametrize(
    ("rule", "letters", "count"),
    [
        ("agree(4)", "aaaa", 4),
        ("agree(4)", "a-a-aa", 6),
        ("agree(4)", "baaaaaaa", None),
        ("answers(3)", "ab-c", 4),
        # Beta(5, 1): 1 - 1/32 = .969. Four equal answers; with one other, six (57/64 = .89, 120/128 = .94, 247/256).
        ("beta(0.95)", "aaaa", 4),
        ("beta(0.95)", "baaaaaa", 7),
        ("beta(0.95)", "abababababab", None),
        ("beta(0.9)", "aaa", 3),
        ("beta(0.95)", "a--aa-a", 7),
        # The runner-up counts, not the number of others.
        ("beta(0.95)", "bcdaaaaaa", 9),
        ("ladder", "aaaa", 4),
        ("ladder", "abaaaa", 5),  # a b a a a: 4 of the latest 5
        ("ladder", "aabbaaa", 7),  # 5 of 7
        ("ladder", "ababababa", None),  # 5 of 9
        ("ladder", "aabababaa", 9),  # 6 of 9, never 5 of 7 nor 4 of 5
        ("ladder", "abcdabcdaabaa", 13),  # late: 4 of the latest 5 are a
        ("ladder", "ab-a-a-a", 8),  # blank samples do not break a run
        # n bets won in a row make (2^(n+1) - 1)/(n+1): 127/7 = 18.1 is less than 1/0.05, 255/8 = 31.9 not. There is
        # no bet on the first answer, so eight of them.
        ("certificate(0.05)", "a" * 20, 8),
        ("certificate(0.1)", "a" * 20, 6),
        ("certificate(0.05)", "ab" * 20, None),
        ("stragglers(2)", "ab" + "c" * 30, 30),
    ],
)
def test_when_a_rule_holds(rule: str, letters: str, count: int | None) -> None:
    assert stops_after(parse_rule(rule), letters) == count


@pytest.mark.parametrize(
    "rule", ["agree(1)", "answers(1)", "beta(0.51)", "ladder", "certificate(0.9)", "stragglers(9)"]
)
def test_no_rule_holds_without_an_answer(rule: str) -> None:
    assert not parse_rule(rule).holds(tally_of(""), 5)
    assert not parse_rule(rule).holds(tally_of("-----"), 5)


def test_the_ladder_does_not_stop_for_one_answer_and_give_another() -> None:
    rule = parse_rule("ladder")
    assert stops_after(rule, "acacadacacbbbb") is None, "4 of the latest 5 are b, but a is ahead by 5 to 4"
    assert stops_after(rule, "acacadacacbbbbb") is None, "level"
    assert stops_after(rule, "acacadacacbbbbbb") == 16


def test_rules_join_and_the_first_to_hold_is_named() -> None:
    rules = parse_rules(["beta(.95)+stragglers(2)", "unassailable"])
    assert [rule.text for rule in rules] == ["beta(0.95)", "stragglers(2)", "unassailable"]
    assert first_to_hold(rules, tally_of("aaab"), 3) is None
    assert first_to_hold(rules, tally_of("aaab"), 2) is rules[1]
    assert first_to_hold(rules, tally_of("aaaa"), 12) is rules[0]
    assert [rule.text for rule in parse_rules([rule.text for rule in rules])] == [rule.text for rule in rules]


@pytest.mark.parametrize(
    "text",
    ["beta", "beta(0.5)", "beta(1)", "beta(95)", "beta(x)", "certificate(0)", "certificate(1)", "certificate(nan)",
     "stragglers(0)", "stragglers(1.5)", "ladder(3)", "agree(inf)", "beta(0.9,0.8)", "beta(-0.9)"],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not in its form"):
        parse_rule(text)


@pytest.mark.parametrize(("first", "second"), [(1, 0), (3, 1), (4, 4), (7, 2), (12, 9)])
def test_beta_against_numerical_integration(first: int, second: int) -> None:
    def density(theta: float) -> float:
        return math.pow(theta, first) * math.pow(1 - theta, second)

    points = 20_000
    values = [density((i + 0.5) / points) for i in range(points)]
    assert leader_probability(first, second) == pytest.approx(sum(values[points // 2 :]) / sum(values), abs=1e-6)


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (3, 0), (2, 5), (9, 4)])
def test_wealth_against_numerical_integration(won: int, lost: int) -> None:
    points = 20_000
    stakes = [(i + 0.5) / points for i in range(points)]
    mean = sum((1 + stake) ** won * (1 - stake) ** lost for stake in stakes) / points
    assert certificate_wealth(won, lost) == pytest.approx(mean, rel=1e-6)


@given(st.integers(0, 30), st.integers(0, 30))
def test_wealth_is_a_fair_game(won: int, lost: int) -> None:
    """With equal odds the mean of the two next wealths is the wealth: nothing is to be had from betting on."""
    next_mean = (certificate_wealth(won + 1, lost) + certificate_wealth(won, lost + 1)) / 2
    assert next_mean == pytest.approx(certificate_wealth(won, lost), rel=1e-12)


def false_certificates(rule: StopRule, odds: dict[str, Fraction], depth: int, tally: Tally | None = None) -> Fraction:
    """The exact probability that ``rule`` ever certifies an answer other than ``a`` within ``depth`` samples."""
    tally = tally or Tally()
    if rule.holds(tally, 10**6):
        leader = tally.leader
        assert leader is not None
        return Fraction(leader.answer != ANSWERS["a"])
    if not depth:
        return Fraction(0)
    return sum(
        (odd * false_certificates(rule, odds, depth - 1, after(tally, letter)) for letter, odd in odds.items()),
        Fraction(0),
    )


@pytest.mark.parametrize("error", ["0.05", "0.3"])
def test_certificates_are_false_at_most_as_often_as_stated_exactly(error: str) -> None:
    """All sequences of the hardest case: two answers, equally likely."""
    even = {"a": Fraction(1, 2), "b": Fraction(1, 2)}
    found = false_certificates(parse_rule(f"certificate({error})"), even, 12)
    assert 0 < found <= Fraction(error)


@pytest.mark.slow
@pytest.mark.parametrize("odds", [{"a": 0.4, "b": 0.4, "c": 0.2}, {"a": 0.34, "b": 0.33, "c": 0.33}, {"a": 1, "b": 1}])
def test_certificates_are_false_at_most_as_often_as_stated_in_64_samples(odds: dict[str, float]) -> None:
    draw, rule, false = random.Random(1), parse_rule("certificate(0.1)"), 0
    for _ in range(1000):
        tally = Tally()
        while tally.finished < 64 and not rule.holds(tally, 64):
            tally = after(tally, draw.choices(list(odds), list(odds.values()))[0])
        leader = tally.leader
        assert leader is not None
        false += tally.finished < 64 and leader.answer != ANSWERS["a"]
    assert false / 1000 <= 0.1


def test_a_certificate_finds_a_clear_leader() -> None:
    draw, rule = random.Random(2), parse_rule("certificate(0.05)")
    found = 0
    for _ in range(40):
        letters = "".join(draw.choices("abc", [0.8, 0.1, 0.1], k=40))
        stopped = stops_after(rule, letters, 64)
        found += stopped is not None
    assert found >= 36


def gamblers(letters: str) -> list[float]:
    """The wealth against every answer but the leader, known or not, when each of many gamblers stakes a fixed part of
    what he has on whoever has led so far, and wins as much if the next answer is that one."""
    stakes = [(i + 0.5) / 2000 for i in range(2000)]
    purses = {rival: [1.0] * len(stakes) for rival in {*letters, "unseen"}}
    leader, seen = None, Counter[str]()
    for letter in letters:
        for rival, purse in purses.items():
            if leader is not None and rival != leader and letter in (leader, rival):
                sign = 1 if letter == leader else -1
                purses[rival] = [wealth * (1 + sign * stake) for wealth, stake in zip(purse, stakes, strict=True)]
        seen[letter] += 1
        if leader is None or seen[letter] > seen[leader]:
            leader = letter
    return [sum(purse) / len(stakes) for rival, purse in purses.items() if rival != leader]


def test_a_certificate_is_what_the_gamblers_have_won() -> None:
    draw, rule, certified = random.Random(4), parse_rule("certificate(0.3)"), 0
    for _ in range(80):
        letters = "".join(draw.choices("abc", [0.8, 0.15, 0.05], k=draw.randint(1, 20)))
        poorest = min(gamblers(letters))
        if abs(poorest * 0.3 - 1) > 1e-3:  # beyond what the mean over the stakes can tell
            assert rule.holds(tally_of(letters), 50) == (poorest * 0.3 >= 1), letters
            certified += poorest * 0.3 >= 1
    assert 20 <= certified <= 60


def test_unassailable_looks_at_the_weights() -> None:
    rule = parse_rule("unassailable")
    assert rule.holds(tally_of("aaaa"), 3)
    # Further samples change the weights of these, so nothing is certain before the end.
    assert not rule.holds(tally_of("aaaa", Weighting(by="length")), 3)
    assert not rule.holds(tally_of("aaaa", Weighting(by="finish")), 1)
