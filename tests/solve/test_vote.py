from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.examples import examples
from trtkit.errors import UsageError
from trtkit.solve.answers import Answer, AnswerMode, read_answer
from trtkit.solve.stopping import UNASSAILABLE, first_to_hold, parse_rule, parse_rules
from trtkit.solve.vote import Tally, WeighBy, Weighting, parse_weighting


def answer(text: str) -> Answer:
    found = read_answer(text, AnswerMode())
    assert found is not None
    return found


def never(one: Answer, other: Answer) -> bool:
    return False


def tally_of(*texts: str | None) -> Tally:
    tally = Tally()
    for index, text in enumerate(texts):
        tally = tally.add(None if text is None else answer(text), tokens=10 + index, index=index, same=never)
    return tally


def test_counts_and_order() -> None:
    tally = tally_of("3", "x", None, "3.0", "\\frac{6}{2}", "x")
    assert [(vote.answer.key, vote.count) for vote in tally.ranked] == [("3", 3), ("x", 2)]
    assert tally.order == (0, 1, 0, 0, 1)
    assert (tally.finished, tally.blank, tally.lead, tally.tied) == (6, 1, 1, False)
    assert Tally().leader is None
    assert not Tally().tied


def test_add_leaves_the_old_tally_alone() -> None:
    before = tally_of("1")
    before.add(answer("1"), tokens=1, index=1, same=never)
    assert before.votes[0].count == 1


def test_zero_is_an_answer() -> None:
    leader = tally_of("0", "0", "5").leader
    assert leader is not None
    assert leader.answer.key == "0"


def test_ties_go_to_the_earliest_in_tokens_whatever_the_arrival() -> None:
    samples = [("a", 50, 0), ("b", 20, 1), ("b", 90, 2), ("a", 30, 3)]
    for order in itertools.permutations(samples):
        tally = Tally()
        for text, tokens, index in order:
            tally = tally.add(answer(text), tokens=tokens, index=index, same=never)
        assert tally.leader is not None
        assert tally.leader.answer.key == "b"
        assert tally.tied


def test_the_spelling_shown_is_the_earliest_samples() -> None:
    samples = [("1007", 30, 0), ("007", 10, 1), ("7.0", 20, 2)]
    mode = AnswerMode(kind="integer", modulus=1000)
    for order in itertools.permutations(samples):
        tally = Tally()
        for text, tokens, index in order:
            tally = tally.add(read_answer(text, mode), tokens=tokens, index=index, same=never)
        assert [(vote.answer.key, vote.answer.raw, vote.count) for vote in tally.votes] == [("7", "007", 3)]


def test_equal_answers_in_another_spelling_are_one_vote() -> None:
    asked: list[tuple[str, str]] = []

    def same(one: Answer, other: Answer) -> bool:
        asked.append((one.key, other.key))
        return {one.key, other.key} == {"2\\sqrt{3}", "\\sqrt{12}"}

    tally = Tally()
    for index, text in enumerate(["7", "2\\sqrt{3}", "\\sqrt{12}", "2\\sqrt3"]):
        tally = tally.add(answer(text), tokens=index, index=index, same=same)
    assert [vote.count for vote in tally.votes] == [1, 3]
    assert tally.votes[1].answer.raw == "2\\sqrt{3}"
    assert ("2\\sqrt{3}", "2\\sqrt{3}") not in asked


@examples(80)
@given(st.lists(st.sampled_from(["a", "b", "c", None]), max_size=7), st.integers(0, 4))
def test_unassailable_is_exactly_what_no_completion_can_change(said: list[str | None], outstanding: int) -> None:
    tally = tally_of(*said)
    leader = tally.leader
    safe = leader is not None
    if leader is not None:
        for rest in itertools.product(["a", "b", "c", "new", None], repeat=outstanding):
            full = tally
            for place, text in enumerate(rest):  # as early in tokens as can be: the worst case for a tie
                full = full.add(None if text is None else answer(text), tokens=1, index=100 + place, same=never)
            assert full.leader is not None
            # A tie decided for the leader is not safe enough: see the rule.
            safe = safe and full.leader.answer == leader.answer and full.lead > 0
    assert UNASSAILABLE.holds(tally, outstanding) == safe


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from(["1", "57", "x"]), st.sampled_from([-2.0, -0.5, -0.1, 0.0])), max_size=6),
    st.integers(0, 3),
    st.sampled_from(["majority", "confidence"]),
    st.booleans(),
)
def test_unassailable_stays_right_when_answers_have_weights(
    said: list[tuple[str, float]], outstanding: int, by: WeighBy, damp: bool
) -> None:
    """The rest as sure of itself as can be, on any answers."""
    tally = weighted(Weighting(by=by, damp_guesses=damp), *((text, 10, sure) for text, sure in said))
    if not UNASSAILABLE.holds(tally, outstanding):
        return
    for rest in itertools.combinations_with_replacement(["1", "57", "x", "new"], outstanding):
        full = tally
        for index, text in enumerate(rest, start=100):
            full = full.add(answer(text), tokens=1, index=index, same=never, confidence=0.0)
        assert winner(full) == winner(tally)


def test_agree_looks_at_the_first_answers_only() -> None:
    rule = parse_rule("agree(3)")
    assert not rule.holds(tally_of("1", "1"), 5)
    assert rule.holds(tally_of("1", None, "1", "1"), 5)
    assert rule.holds(tally_of("1", "1", "1", "2"), 5)
    assert not rule.holds(tally_of("2", "1", "1", "1", "1"), 5)
    assert not rule.holds(tally_of(None, None, None), 5)


def test_rules_read_and_combine() -> None:
    rules = parse_rules([" agree( 4 ) + unassailable", "agree(4)"])
    assert [rule.text for rule in rules] == ["agree(4)", "unassailable"]
    tally = tally_of("1", "1", "1", "1")
    assert first_to_hold(rules, tally, 9) is rules[0]
    assert first_to_hold(rules[1:], tally, 3) is rules[1]
    assert first_to_hold(rules[1:], tally, 4) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("agre(4)", "did you mean 'agree'"),
        ("agree", "agree\\(N\\)"),
        ("agree()", "agree\\(N\\)"),
        ("agree(0)", "agree\\(N\\)"),
        ("agree(x)", "agree\\(N\\)"),
        ("agree(4,5)", "agree\\(N\\)"),
        ("agree(4,)", None),
        ("unassailable(3)", "not in its form"),
        ("", "unknown stop rule"),
        ("agree(4", "unknown stop rule"),
    ],
)
def test_rules_that_cannot_be_read(text: str, says: str | None) -> None:
    if says is None:
        assert parse_rule(text).text == "agree(4)"
        return
    with pytest.raises(UsageError, match=says):
        parse_rule(text)


def weighted(weighting: Weighting, *samples: tuple[str, int] | tuple[str, int, float]) -> Tally:
    tally = Tally(weighting=weighting)
    for index, (text, tokens, *confidence) in enumerate(samples):
        tally = tally.add(
            answer(text), tokens=tokens, index=index, same=never, confidence=confidence[0] if confidence else None
        )
    return tally


def winner(tally: Tally) -> str:
    assert tally.leader is not None
    return tally.leader.answer.key


def test_weights_by_finish_order() -> None:
    samples = [("b", 900), ("b", 800), ("a", 100), ("b", 850), ("a", 120)]
    tally = weighted(Weighting(by="finish"), *samples)
    # a finished 1st and 2nd: 1 + 1/sqrt 2 = 1.707; b 3rd to 5th: .577 + .5 + .447 = 1.524
    assert tally.weights == pytest.approx((1.52457, 1.70711), abs=1e-5)
    assert winner(tally) == "a"
    assert winner(weighted(Weighting(), *samples)) == "b"


def test_weights_by_length() -> None:
    tally = weighted(Weighting(by="length"), ("b", 400), ("a", 100), ("b", 200), ("b", 0 + 800))
    assert tally.weights == pytest.approx((0.25 + 0.5 + 0.125, 1.0))
    assert winner(tally) == "a"


def test_weights_by_confidence() -> None:
    tally = weighted(Weighting(by="confidence"), ("b", 10, -2.0), ("b", 11, -2.0), ("a", 12, -0.1))
    assert winner(tally) == "a"
    assert tally.weights == pytest.approx((2 * 0.135335, 0.904837), abs=1e-5)
    assert winner(weighted(Weighting(by="confidence"), ("b", 10), ("b", 11), ("a", 12))) == "b", "unknown: 1 each"


def test_guess_like_answers_are_damped() -> None:
    damped = Weighting(damp_guesses=True)
    for guess in ("20", "0", "1", "300", "-5"):
        tally = weighted(damped, (guess, 10), ("57", 20))
        assert winner(tally) == "57"
        assert tally.weights == (0.6, 1.0)
    for text in ("21", "150", "1/2", "x"):
        assert winner(weighted(damped, (text, 10), ("57", 20))) == text
    assert winner(weighted(damped, ("0", 10), ("0", 11), ("57", 20))) == "0", "0 is an answer, only a cheap one"


@pytest.mark.parametrize("by", ["majority", "finish", "length", "confidence"])
def test_damping_is_all_that_tells_guesses_from_other_answers(by: WeighBy) -> None:
    samples = [("a", 50, -0.3), ("b", 0, -0.4), ("a", 90, -0.1), ("c", 30, -0.2)]
    spelled = {"a": "20", "b": "300", "c": "1/2"}
    plain = weighted(Weighting(by=by), *samples).weights
    guesses = [(spelled[text], tokens, sure) for text, tokens, sure in samples]
    assert weighted(Weighting(by=by), *guesses).weights == plain
    assert weighted(Weighting(by=by, damp_guesses=True), *guesses).weights == pytest.approx(
        (0.6 * plain[0], 0.6 * plain[1], plain[2])
    )


@pytest.mark.parametrize("by", ["majority", "finish", "length", "confidence"])
def test_weighted_winners_do_not_depend_on_the_arrival(by: WeighBy) -> None:
    samples = [("a", 50, 0, -0.3), ("b", 20, 1, -0.4), ("b", 90, 2, -0.1), ("a", 30, 3, -0.2), ("c", 10, 4, -0.05)]
    found = set()
    for order in itertools.permutations(samples):
        tally = Tally(weighting=Weighting(by=by))
        for text, tokens, index, confidence in order:
            tally = tally.add(answer(text), tokens=tokens, index=index, same=never, confidence=confidence)
        found.add((winner(tally), tally.lead))
    assert len(found) == 1


def test_weightings_read_and_refuse() -> None:
    assert parse_weighting(" length + damped ") == Weighting(by="length", damp_guesses=True)
    assert parse_weighting("damped").text == "majority+damped"
    for text in ("lenght", "length+finish", "", "majority+x"):
        with pytest.raises(UsageError, match="unknown weighting"):
            parse_weighting(text)
    with pytest.raises(UsageError, match="did you mean 'length'"):
        parse_weighting("lenght")
