"""The generated problems are true: answers against brute force, every written step, seeds, and disjoint splits."""

from __future__ import annotations

import json
import math
import re
from itertools import islice
from pathlib import Path
from random import Random

import pytest
from practice.families import LARGEST, LEVELS, Draft
from practice.files import DEMO_COUNT, FILES_SEED, HELDOUT_COUNT, problem_rows, read_rows
from practice.problems import (
    MAKERS,
    PROMPT_KINDS,
    balanced,
    messages,
    render_completion,
    render_prompt,
    split_of,
    stream,
    write_thought,
)

ROOT = Path(__file__).resolve().parents[2]

PER_LEVEL = 60
EXPRESSION = re.compile(r"[0-9+\-*/()]+")
CASES = [(family, level) for family in MAKERS for level in LEVELS]


def drafts(family: str, level: int) -> list[Draft]:
    rng = Random(f"{family}{level}")
    made = (MAKERS[family](rng, level) for _ in range(50 * PER_LEVEL))
    return list(islice((draft for draft in made if draft is not None and draft.answer <= LARGEST), PER_LEVEL))


def brute_force(family: str, key: tuple[int | str, ...]) -> int:
    """The answer from the problem's numbers by the slowest obvious way."""
    n = [int(item) if isinstance(item, int) else 0 for item in key]
    match family:
        case "gcd":
            return max(d for d in range(1, n[1] + 1) if n[0] % d == n[1] % d == 0)
        case "modular":
            return math.prod(n[1:]) % n[0]
        case "linear":
            a, b, c, offset, right = n
            (solution,) = [x for x in range(1000) if a * (x + offset) + b == c * x + right]
            return solution
        case "series":
            whole, a, step, count = n
            terms = [a + step * index for index in range(count)]
            return sum(terms) if whole else terms[-1]
        case "recurrence":
            modulus, p, q, value, steps = n
            for _ in range(steps):
                value = (p * value + q) % modulus
            return value
        case "counting" if key[0] == "people":
            first, second, both, outside = n[1:]
            return outside or len(set(range(first)) | set(range(first - both, first - both + second)))
        case "counting":
            neither, p, q, limit = n[1:]
            hits = sum(number % p == 0 or number % q == 0 for number in range(1, limit + 1))
            return limit - hits if neither else hits
        case "base":
            *texts, base = key[1:]
            if key[0] == "write":
                (answer,) = [x for x in range(1000) if set(str(x)) <= set("012345678") and _read(x, n[2]) == n[1]]
                return answer
            return sum(int(str(text), int(base)) for text in texts)
        case "shopping":
            total = sum(count * price for count, price in zip(n[2::2], n[3::2], strict=True))
            return total // n[0] if n[0] else n[1] - total
    raise AssertionError(family)


def _read(number: int, base: int) -> int:
    return int(str(number), base) if all(int(digit) < base for digit in str(number)) else -1


def value_of(expression: str) -> float:
    assert EXPRESSION.fullmatch(expression), expression
    return float(eval(expression))


def equal_chain(text: str) -> None:
    """`a=b=c` holds; text with an unknown in it is left to the brute force."""
    parts = text.split("=")
    if all(EXPRESSION.fullmatch(part) for part in parts):
        assert len({value_of(part) for part in parts}) == 1, text


def check_line(line: str) -> None:
    """One written line: its notes, and that the operation at its head gives the value at its end."""
    if ":" not in line or "->" not in line:
        if "=" in line:
            equal_chain(line.removeprefix("sum="))
        return
    head, rest = line.split(":", 1)
    notes, result = rest.rsplit("->", 1)
    for note in notes.split(","):
        if "<" in note:
            low, high = note.split("<")
            assert int(low) < int(high)
        else:
            equal_chain(note)
    value, _, remainder = result.partition(" r")
    if "/" in head:
        a, b = map(int, head.split("/"))
        assert (int(value), int(remainder or 0)) == divmod(a, b), line
    elif " mod " in head:
        a, b = map(int, head.split(" mod "))
        assert int(value) == a % b, line
    elif head.startswith("x"):
        assert int(value) == int(re.findall(r"\d+", notes)[-1]), line
    else:
        assert value_of(head) == int(value), line


@pytest.mark.parametrize(("family", "level"), CASES)
def test_answers_match_brute_force(family: str, level: int) -> None:
    made = drafts(family, level)
    assert len(made) == PER_LEVEL
    for draft in made:
        assert draft.answer == brute_force(family, draft.key), draft


@pytest.mark.parametrize(("family", "level"), CASES)
def test_every_written_step_is_true_and_small(family: str, level: int) -> None:
    for draft in drafts(family, level):
        thought = write_thought(draft, checked=True)
        assert thought.endswith(f"\\boxed{{{draft.answer}}}.")
        for line in thought.splitlines():
            check_line(line)
            assert all(int(number) <= LARGEST for number in re.findall(r"\d+", line)), line


@pytest.mark.parametrize("family", ["gcd", "modular", "recurrence"])
def test_wordings_name_the_numbers_of_the_key(family: str) -> None:
    for draft in drafts(family, 1):
        for wording in draft.wordings:
            assert {str(number) for number in draft.key} <= set(re.findall(r"\d+", wording)), wording


def test_a_wrong_step_would_be_found() -> None:
    for line in ("47+38:7+8=15,4+3+1=9->85", "47+38:7+8=15,4+3+1=8->95", "371/7:37=5*7+2,21=3*7+0->54"):
        with pytest.raises(AssertionError):
            check_line(line)


def test_same_seed_same_problems() -> None:
    first, second = (list(islice(stream(Random(5), "train"), 50)) for _ in range(2))
    assert first == second
    assert list(islice(stream(Random(6), "train"), 50)) != first


def test_splits_are_disjoint_in_mathematics() -> None:
    shares = {"train": 0, "heldout": 0, "demo": 0}
    for family, level in CASES:
        for draft in drafts(family, level):
            shares[split_of(family, draft.key)] += 1
    assert shares["train"] > 10 * shares["heldout"] > 0
    assert shares["demo"] > 0
    texts = [{problem.text for problem in balanced(1, split, 160)} for split in ("train", "heldout", "demo")]
    assert not texts[0] & texts[1]
    assert not texts[0] & texts[2]
    assert not texts[1] & texts[2]


def test_bundled_files_are_what_the_command_writes() -> None:
    folder = ROOT / "engines" / "practice"
    heldout = problem_rows(balanced(FILES_SEED, "heldout", HELDOUT_COUNT), "practice")
    assert read_rows(folder / "problems.jsonl") == heldout
    assert read_rows(folder / "demo.jsonl") == problem_rows(balanced(FILES_SEED, "demo", DEMO_COUNT), "demo")


def test_prompt_is_what_the_chat_template_writes() -> None:
    jinja2 = pytest.importorskip("jinja2")
    document = json.loads((ROOT / "engines" / "practice" / "tokenizer_config.json").read_text())
    template = jinja2.Template(document["chat_template"])
    for kind in PROMPT_KINDS:
        written = template.render(messages=messages("What is 1+1?", kind), add_generation_prompt=True)
        assert written == render_prompt("What is 1+1?", kind)


def test_completion_boxes_the_answer_before_and_after_the_thought() -> None:
    for problem in balanced(3, "train", 24):
        thought, final = render_completion(problem).split("</think>")
        boxed = f"\\boxed{{{problem.answer}}}"
        assert boxed in thought
        assert boxed in final
        assert problem.generated_solution.startswith("<think>\n")
