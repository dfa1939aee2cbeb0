"""The thought switching penalty: changes to the logits that depend on the tokens before them.

A reasoning model that drops a promising thought for another one ("Alternatively, ...") wastes tokens. The penalty of
Wang et al., "Thoughts Are All Over the Place" (arXiv 2501.18585), lowers the logits of the words that open a new
thought by alpha while the current thought is younger than beta tokens::

    z[v] -= alpha   for v in the switch tokens, while t - start < beta

t counts tokens, ``start`` is where the current thought began: the first generated token, or the last switch token that
was written. It is a function of the tokens on the path to a draft-tree node and of nothing else, so every node gets the
logits that plain decoding would have had there, and speculative decoding stays exact.

Letters: R rows, N nodes of the draft tree, V vocab, K switch tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drafter.tree import TokenTree
from trtkit.errors import UsageError
from trtkit.runtime.api import SwitchPenalty
from trtkit.runtime.scheduler import Row

__all__ = [
    "SWITCH_WORDS",
    "SwitchRows",
    "parse_switch_penalty",
    "penalised",
    "read_switch_penalty",
    "switch_rows",
    "switch_tokens",
    "thought_age",
]

SWITCH_WORDS = ("Alternatively", "alternatively")
"""The published choice."""
_LETTERS = 4
"""A word's first piece must hold this many of its letters (or all of them): shorter ones begin too many other words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchRows:
    """The rows of a step that share one penalty, and how old their thoughts are."""

    penalty: SwitchPenalty
    tokens: Tensor
    """int64 (K,): the switch tokens."""
    rows: Tensor
    """int64 (r,): which of the R rows."""
    age: Tensor
    """int64 (r,): tokens of the current thought up to the pending token; the age of the next token."""


def switch_rows(rows: Sequence[Row], device: torch.device) -> tuple[SwitchRows, ...]:
    """Where the thoughts of the rows with a penalty stand, grouped by penalty."""
    groups: dict[SwitchPenalty, list[int]] = {}
    for index, row in enumerate(rows):
        penalty = row.request.sampling.switch
        if penalty is not None:
            groups.setdefault(penalty, []).append(index)
    return tuple(
        SwitchRows(
            penalty=penalty,
            tokens=torch.tensor(penalty.tokens, device=device),
            rows=torch.tensor(members, device=device),
            age=torch.tensor(
                [thought_age(rows[i].tokens, len(rows[i].request.prompt), penalty) for i in members], device=device
            ),
        )
        for penalty, members in groups.items()
    )


def thought_age(tokens: Sequence[int], prompt: int, penalty: SwitchPenalty) -> int:
    """Tokens since the current thought began, of which the first ``prompt`` do not count; at most ``beta``.

    Thoughts that are ``beta`` tokens old or older are all alike, so only the last ``beta`` tokens are looked at.
    """
    recent = tokens[max(prompt, len(tokens) - penalty.beta) :]
    opens = frozenset(penalty.tokens)
    if opens.isdisjoint(recent):  # in C, and the usual case
        return len(recent)
    return next(age for age, token in enumerate(reversed(recent), start=1) if token in opens)


@contextlib.contextmanager
def penalised(logits: Tensor, tree: TokenTree, groups: Sequence[SwitchRows]) -> Iterator[None]:
    """Inside the block the switch tokens' logits (R, N, V) are lower at every node whose thought is young."""
    own: list[tuple[tuple[Tensor, Tensor, Tensor], Tensor]] = []
    for group in groups:
        rows, tokens, penalty = group.rows, group.tokens, group.penalty
        age = _ages(tree.tokens[rows], tree.depth[rows], tree.mask[rows], group.age, tokens)
        lowered = penalty.alpha * (age < penalty.beta)[:, :, None]  # (r, N, 1)
        node = torch.arange(logits.shape[1], device=logits.device)
        at = (rows[:, None, None], node[None, :, None], tokens[None, None, :])
        own.append((at, logits[at]))
        logits[at] = (logits[at].float() - lowered).to(logits.dtype)
    yield
    for at, values in own:
        logits[at] = values


def _ages(nodes: Tensor, depth: Tensor, mask: Tensor, root: Tensor, tokens: Tensor) -> Tensor:
    """Age of the thought at every node: int64 (r, N), from the root's (r,)."""
    opens = torch.isin(nodes, tokens)
    # The deepest switch token below the root on the way to each node, 0 for none (what the root carries is in its own
    # age); a thought's first token makes it 1 token old.
    last = torch.where(mask & opens[:, None, :], depth[:, None, :], 0).amax(dim=2)
    return torch.where(last > 0, depth - last + 1, root[:, None] + depth)


def switch_tokens(
    encode: Callable[[str], Sequence[int]], decode: Callable[[Sequence[int]], str], words: Sequence[str] = SWITCH_WORDS
) -> tuple[int, ...]:
    """The ids with which a tokenizer begins each of ``words``, alone and after a space.

    A word of several pieces counts by its first one. Raises :class:`UsageError` when a word is spelled in pieces so
    short that many other words begin with them in every form (as with tiny vocabularies).
    """
    found: dict[int, None] = {}
    usable: set[str] = set()
    seen: list[str] = []
    for word in words:
        for form in (word, " " + word):
            token = next((i for i in encode(form) if decode([i]).strip()), None)
            if token is None:
                continue
            piece = decode([token]).strip()
            if word.startswith(piece) and len(piece) >= min(_LETTERS, len(word)):
                found[token] = None
                usable.add(word.lower())
            else:
                seen.append(f"{form!r} begins with the piece {piece!r}, which other words share")
    if not found or {word.lower() for word in words} - usable:
        raise UsageError(
            "this tokenizer has no piece of its own for a switch word",
            offenders=seen,
            hint="name words that it knows, e.g. --switch-penalty 3,600,Wait",
        )
    return tuple(sorted(found))


def read_switch_penalty(
    text: str, encode: Callable[[str], Sequence[int]], decode: Callable[[Sequence[int]], str]
) -> SwitchPenalty:
    """``--switch-penalty`` for a tokenizer; see :func:`parse_switch_penalty` and :func:`switch_tokens`.

    Raises :class:`UsageError`, or :class:`RequestError` for numbers out of range.
    """
    alpha, beta, words = parse_switch_penalty(text)
    return SwitchPenalty(alpha=alpha, beta=beta, tokens=switch_tokens(encode, decode, words))


def parse_switch_penalty(text: str) -> tuple[float, int, tuple[str, ...]]:
    """``3,600`` or ``3,600,Wait,Hmm`` -> (alpha, beta, words). Raises :class:`UsageError`."""
    alpha, _, rest = text.partition(",")
    beta, *words = [part.strip() for part in rest.split(",")]
    try:
        parsed = float(alpha), int(beta)
    except ValueError:
        parsed = None
    if parsed is None or not all(words):
        raise UsageError(
            f"--switch-penalty {text!r}: not a penalty", hint="ALPHA,BETA or ALPHA,BETA,WORD,...; published: 3,600"
        )
    return (*parsed, tuple(words) or SWITCH_WORDS)
