from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trtkit.solve.stop_text import end_of_text

TAG = "</think>"
PIECES = (
    "</",
    "think",
    ">",
    ">\n",
    "<",
    "/think",
    "/",
    "t",
    "hink",
    "</think>",
    "a",
    ">>",
    "k>\n\n",
    "x</t",
    "",
)


def decode(tokens: Sequence[int]) -> str:
    return "".join(PIECES[token] for token in tokens)


def stream(tokens: Sequence[int], cuts: Sequence[int]) -> int | None:
    """Feed ``tokens`` in steps of the given sizes, as the solver does."""
    seen, sizes = 0, iter(cuts)
    while seen < len(tokens):
        size = next(sizes, 1)
        end = end_of_text(tokens[: seen + size], seen, TAG, decode)
        if end is not None:
            return end
        seen += size
    return None


@pytest.mark.parametrize(
    ("tokens", "end"),
    [
        ((0, 1, 2), 3),
        ((0, 1, 3), 3),  # ">" merged with the newline after it
        ((10, 13, 8, 2, 10), 4),
        ((9,), 1),
        ((4, 6, 7, 8, 11), 5),
        ((0, 1, 10), None),
        ((0, 0, 1, 2), 4),
        ((), None),
    ],
)
def test_every_way_to_spell_the_tag(tokens: tuple[int, ...], end: int | None) -> None:
    for size in (1, 2, 3, 8):
        assert stream(tokens, [size] * 9) == end


# Pieces are never empty here: the promise is about tokens that hold at least one byte.
@given(
    st.lists(st.integers(0, len(PIECES) - 2), max_size=25),
    st.lists(st.integers(1, 6), min_size=25, max_size=25),
)
def test_the_end_does_not_depend_on_the_steps(tokens: list[int], cuts: list[int]) -> None:
    expected = next((n for n in range(1, len(tokens) + 1) if TAG in decode(tokens[:n])), None)
    assert stream(tokens, cuts) == expected


def test_with_a_real_tokenizer_that_merges_across_the_tag() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["</think>\n\nSo", "x</think>\n", "think", "y ≤</"] * 30, trainer)
    for before, after in (("", "\n\nSo"), ("x", "\n"), ("y ≤", "\n\nSo"), ("\u2264", "!")):
        tokens = tokenizer.encode(f"{before}</think>{after}").ids
        ends = {stream_real(tokenizer, tokens, size) for size in (1, 2, 3, 50)}
        assert len(ends) == 1
        end = ends.pop()
        assert end is not None
        assert TAG in tokenizer.decode(tokens[:end])
        assert TAG not in tokenizer.decode(tokens[: end - 1])


def stream_real(tokenizer: Tokenizer, tokens: list[int], size: int) -> int | None:
    for seen in range(0, len(tokens), size):
        end = end_of_text(tokens[: seen + size], seen, TAG, lambda ids: tokenizer.decode(list(ids)))
        if end is not None:
            return end
    return None


def test_only_a_short_tail_is_decoded() -> None:
    decoded: list[int] = []

    def counting(tokens: Sequence[int]) -> str:
        decoded.append(len(tokens))
        return decode(tokens)

    end_of_text([10] * 100_000, 99_999, TAG, counting)
    assert max(decoded) <= len(TAG)
