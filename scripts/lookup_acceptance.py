"""How many drafts of `--lookup` saved samples would have accepted: tokens per step by tree, without a model.

    python scripts/lookup_acceptance.py traces.jsonl --tokenizer CHECKPOINT

A row has `problem` and `text`. The samples of a problem are written as an engine would write them, a step of each in
turn, every one of them drafting from all; a draft is accepted as far as the sample says the same. Texts count up to
`</think>`. Samples that never come to it are left out: most went in circles, and nothing is easier to look up.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import AutoTokenizer

from drafter.config import TreeShape
from trtkit.chat import THINK_END
from trtkit.runtime.lookup import LOOKUP_TREES, SharedText


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a checkpoint of the model that wrote them")
    parser.add_argument("--alone", action="store_true", help="each sample drafts from its prompt and itself only")
    arguments = parser.parse_args()
    problems = _read(arguments.traces, arguments.tokenizer)
    samples = [sample for _, texts in problems for sample in texts]
    print(f"{len(samples)} samples of {len(problems)} problems, {sum(map(len, samples)):,} tokens")
    for shape in LOOKUP_TREES:
        if shape is not None:
            steps, reached = 0, [0] * shape.length
            for prompt, texts in problems:
                for group in [[text] for text in texts] if arguments.alone else [texts]:
                    for accepted in _decoded(prompt, group, shape):
                        steps += 1
                        for depth in range(accepted):
                            reached[depth] += 1
            shares = ", ".join(f"{count / steps:.2f}" for count in reached)
            print(f"{shape!s:>4}  {1 + sum(reached) / steps:.2f} tokens per step; accepted by depth: {shares}")


def _read(path: Path, checkpoint: Path) -> list[tuple[list[int], list[list[int]]]]:
    """The tokens of each problem and of its samples."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    texts: dict[str, list[str]] = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        thought, ended, _ = row["text"].partition(THINK_END)
        if ended:
            texts[row["problem"]].append(thought)
    return [(_ids(tokenizer, problem), [_ids(tokenizer, text) for text in group]) for problem, group in texts.items()]


def _ids(tokenizer: AutoTokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _decoded(prompt: Sequence[int], samples: Sequence[Sequence[int]], shape: TreeShape) -> Iterator[int]:
    """Decode ``samples`` in lockstep: for each step of each, how many drafts it accepts."""
    shared = SharedText(prompt)
    numbers, done = [shared.begin() for _ in samples], [0] * len(samples)
    while any(at < len(sample) for at, sample in zip(done, samples, strict=True)):
        for index, sample in enumerate(samples):
            if (at := done[index]) < len(sample):
                drafts = shared.draft(numbers[index], shape.beams, shape.length)
                accepted = max((_equal(draft, sample[at:]) for draft in drafts), default=0)
                accepted = min(accepted, len(sample) - at - 1)  # each step draws one token itself
                shared.write(numbers[index], sample[at : at + accepted + 1])
                done[index] += accepted + 1
                yield accepted


def _equal(draft: Sequence[int], tokens: Sequence[int]) -> int:
    pairs = zip(draft, tokens[: len(draft)], strict=False)
    return next((count for count, (one, other) in enumerate(pairs) if one != other), min(len(draft), len(tokens)))


if __name__ == "__main__":
    main()
