"""Whether two engines say the same: an engine directory and a server that runs it, or any two of them.

    python scripts/compare_sources.py ENGINE http://localhost:8000/v1 --problems engines/practice/problems.jsonl

Both answer the problems at temperature 0. Printed: how many answers are the same token for token, how many tokens
both have said up to the first that differs, and how far the log-probabilities of these differ. Rounding alone makes
near-ties fall differently now and then; a format that is read wrongly makes nearly every answer another.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trtkit.chat import VARIANTS
from trtkit.runtime.api import Request, SamplingParams
from trtkit.runtime.endpoint.remote import connect
from trtkit.runtime.endpoint.server import endpoint_named
from trtkit.runtime.load import OpenOptions
from trtkit.runtime.sources import DirectorySource, Source
from trtkit.solve.problems import Problem, read_problems


@dataclass(slots=True)
class Answer:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs=2, metavar="DIR_OR_URL")
    parser.add_argument("--problems", type=Path, required=True)
    parser.add_argument("--most", type=int, default=60, help="of the problems (60)")
    parser.add_argument("--new-tokens", type=int, default=200, help="of each answer, at most (200)")
    parser.add_argument("--rows", type=int, default=8, help="answered at once (8)")
    parser.add_argument("--tokenizer", help="of what the servers serve; default: what they say")
    options = parser.parse_args()
    problems = read_problems(options.problems)[: options.most]
    one, other = (
        answers_of(source_named(name, options.tokenizer), problems, options.new_tokens, options.rows)
        for name in options.sources
    )
    pairs = [(one[problem.id], other[problem.id]) for problem in problems]
    shared = [common(first.tokens, second.tokens) for first, second in pairs]
    gaps = [
        abs(mine - theirs)
        for (first, second), length in zip(pairs, shared, strict=True)
        for mine, theirs in zip(first.logprobs[:length], second.logprobs[:length], strict=True)
    ]
    same = sum(first.tokens == second.tokens for first, second in pairs)
    longest = sum(max(len(first.tokens), len(second.tokens)) for first, second in pairs)
    print(f"{same} of {len(pairs)} answers are the same; {sum(shared):,} of {longest:,} tokens up to a difference")
    if gaps:
        print(f"log-probabilities differ by {statistics.fmean(gaps):.1e} on average, {max(gaps):.2g} at most")


def source_named(name: str, tokenizer: str | None) -> Source:
    """A directory, or a server by its address."""
    if "://" in name:
        return connect(endpoint_named(name, seeds=False), tokenizer)  # seeds mean nothing at temperature 0
    return DirectorySource.of(Path(name))


def answers_of(source: Source, problems: Sequence[Problem], new_tokens: int, rows: int) -> dict[str, Answer]:
    """The likeliest answer to each problem."""
    answers = {problem.id: Answer() for problem in problems}
    with source.open(OpenOptions(rows=rows, speculative=False)) as engine:
        for problem in problems:
            engine.submit(
                Request(
                    id=problem.id, prompt=source.chat.prompt(problem.text, VARIANTS["solve"]),
                    sampling=SamplingParams(temperature=0.0), stop_ids=source.chat.eos_ids, max_tokens=new_tokens,
                    seed=0, logprobs=True,
                )
            )  # fmt: skip
        while engine.has_work:
            for output in engine.step():
                answers[output.request_id].tokens += output.tokens
                answers[output.request_id].logprobs += output.logprobs
    return answers


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens up to the first that differs."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (mine, theirs) in pairs if mine != theirs), min(len(one), len(other)))


if __name__ == "__main__":
    main()
