"""Problems, their splits and their prompts.

Every draw comes from a seeded generator. A problem's split follows from a hash of its mathematics (not its wording),
so no held-out problem can reappear in training under another phrase.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from random import Random

from practice.families import (
    LARGEST,
    LEVELS,
    Draft,
    Maker,
    make_gcd,
    make_linear,
    make_modular,
    make_recurrence,
    make_series,
)
from practice.families_words import make_base, make_counting, make_shopping

MAKERS: dict[str, Maker] = {
    "gcd": make_gcd,
    "modular": make_modular,
    "linear": make_linear,
    "counting": make_counting,
    "series": make_series,
    "recurrence": make_recurrence,
    "base": make_base,
    "shopping": make_shopping,
}
SPLITS = ("train", "heldout", "demo")
CHECK_SHARE = 0.3
EVEN_LEVELS = (1.0, 1.0, 1.0)

SYSTEM_PROMPT = (
    "You are a helpful and harmless assistant. You should think step-by-step. Return final answer within \\boxed{}."
)
PROMPT_KINDS = ("solve", "reason", "system")


@dataclass(frozen=True, slots=True, kw_only=True)
class PracticeProblem:
    """A problem with its answer and one worked solution."""

    family: str
    level: int
    text: str
    answer: int
    thought: str

    @property
    def final(self) -> str:
        """What follows `</think>`."""
        return f"The answer is \\boxed{{{self.answer}}}."

    @property
    def generated_solution(self) -> str:
        """The answer of a reasoning model, as R1-style data sets store it."""
        return f"<think>\n{self.thought}\n</think>\n\n{self.final}"


def split_of(family: str, key: tuple[int | str, ...]) -> str:
    """1/16 of all problems is held out, another 1/16 is for the demo, the rest is for training."""
    place = sha256(f"{family}{key}".encode()).digest()[0] % 16
    return {0: "heldout", 1: "demo"}.get(place, "train")


def write_thought(draft: Draft, *, checked: bool) -> str:
    """The text inside the think block; the boxed answer is its last line."""
    lines = list(draft.lines)
    if checked and draft.check:
        lines += ["Wait, let me check.", *draft.check, "Yes."]
    return "\n".join([*lines, f"So the answer is \\boxed{{{draft.answer}}}."])


def draw_problem(rng: Random, split: str, family: str, level: int) -> PracticeProblem:
    """Draw until a problem of the split comes up."""
    while True:
        draft = MAKERS[family](rng, level)
        if draft is None or not 0 <= draft.answer <= LARGEST or split_of(family, draft.key) != split:
            continue
        return PracticeProblem(
            family=family,
            level=level,
            text=rng.choice(draft.wordings),
            answer=draft.answer,
            thought=write_thought(draft, checked=rng.random() < CHECK_SHARE),
        )


def stream(
    rng: Random, split: str, *, level_weights: tuple[float, ...] = EVEN_LEVELS, families: tuple[str, ...] = ()
) -> Iterator[PracticeProblem]:
    """Endless problems, families evenly mixed."""
    names = families or tuple(MAKERS)
    while True:
        yield draw_problem(rng, split, rng.choice(names), rng.choices(LEVELS, level_weights)[0])


def balanced(seed: int, split: str, count: int) -> list[PracticeProblem]:
    """`count` distinct problems, families and levels in turn."""
    rng, seen, found = Random(f"{split}-{seed}"), set[str](), list[PracticeProblem]()
    names = tuple(MAKERS)
    while len(found) < count:
        place = len(found)
        family, level = names[place % len(names)], LEVELS[place // len(names) % len(LEVELS)]
        problem = draw_problem(rng, split, family, level)
        if problem.text not in seen:
            seen.add(problem.text)
            found.append(problem)
    return found


def messages(text: str, kind: str) -> list[dict[str, str]]:
    """The chat turns of one prompt variant."""
    if kind == "solve":
        return [{"role": "user", "content": f"Solve the problem, and put the answer in \\boxed{{}}. {text}"}]
    if kind == "reason":
        request = "Please reason step by step, and put your final answer within \\boxed{}."
        return [{"role": "user", "content": f"{request}\n{text}"}]
    assert kind == "system"
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": text}]


def render_prompt(text: str, kind: str) -> str:
    """The prompt as text; the chat template writes the same (a test holds both together)."""
    turns = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in messages(text, kind))
    return f"{turns}<|im_start|>assistant\n<think>\n"


def render_completion(problem: PracticeProblem) -> str:
    """What the model should write after the prompt."""
    return f"{problem.thought}\n</think>\n\n{problem.final}<|im_end|>"
