"""The thought switching penalty against its formula written out, and under speculation against plain decoding."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drafter.config import DrafterConfig, TreeShape
from drafter.model import Drafter
from drafter.tree import build_tree
from tests.engines import random_prompts, request, run_all
from tests.examples import examples
from tests.tiny import save_tiny, tiny_model
from trtkit.bundled import practice_dir
from trtkit.chat import load_chat
from trtkit.checkpoint.unified import open_unified
from trtkit.errors import RequestError, UsageError
from trtkit.runtime.api import Request, SamplingParams, SwitchPenalty
from trtkit.runtime.model import DecoderModel
from trtkit.runtime.processors import (
    SWITCH_WORDS,
    parse_switch_penalty,
    penalised,
    read_switch_penalty,
    switch_rows,
    switch_tokens,
)
from trtkit.runtime.sampling import pick, sampling_rows
from trtkit.runtime.scheduler import Prefix, Row
from trtkit.runtime.torch_engine import TorchEngine
from trtkit.runtime.torch_options import Drafting, TorchLimits

VOCAB = 12
"""So small that drafts are often right and switch tokens are frequent."""
PENALTIES = (
    SwitchPenalty(alpha=3.0, beta=4, tokens=(5,)),
    SwitchPenalty(alpha=1.5, beta=9, tokens=(1, 5, 8)),
    SwitchPenalty(alpha=50.0, beta=2, tokens=(0, 7)),
    SwitchPenalty(alpha=4.0, beta=1, tokens=(2, 3)),
    SwitchPenalty(alpha=2.0, beta=1000, tokens=(4, 6)),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DecoderModel:
    directory = save_tiny(tmp_path_factory.mktemp("small"), vocab_size=VOCAB)
    return DecoderModel(open_unified(directory), device=torch.device("cpu"), dtype=torch.float32, max_tokens=300)


class _Table(Drafter):
    """A head that continues with the target's own likeliest bigram, so that long runs are accepted."""

    def __init__(self) -> None:
        super().__init__(DrafterConfig(hidden_size=256, vocab_size=VOCAB, exit_dim=8))
        target = tiny_model(vocab_size=VOCAB)
        with torch.no_grad():
            self._table = target.model.embed_tokens.weight.clone()
            self._next = target(torch.arange(VOCAB)[:, None]).logits[:, -1]

    def step(
        self, context: torch.Tensor, state: torch.Tensor, embedding: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        token = (embedding @ self._table.T - 0.5 * (self._table**2).sum(1)).argmax(-1)
        return self._next[token], state


@pytest.fixture(scope="module")
def head() -> Drafter:
    return _Table().eval().requires_grad_(False)


def _engine(
    model: DecoderModel, head: Drafter | None = None, tree: TreeShape | None = None, **limits: Any
) -> TorchEngine:
    drafting = Drafting(head=head, trees=(tree,)) if head is not None and tree is not None else None
    return TorchEngine(model, TorchLimits(**{"rows": 8, "total_tokens": 200, "kv_blocks": 300, **limits}), drafting)


def _requests(seed: int) -> list[Request]:
    prompts = random_prompts(seed, [1, 9, 33], vocab=VOCAB)
    sampling: list[dict[str, Any]] = [{"temperature": 1.0}, {"temperature": 0.0}, {"temperature": 1.2, "top_k": 5}]
    return [
        request(
            str(i), prompts[i % 3], seed=seed + i, max_tokens=5 + 12 * (i % 4), **sampling[(i // 2) % 3],
            switch=None if i % 4 == 3 else PENALTIES[(seed + i) % len(PENALTIES)],
        )
        for i in range(10)
    ]  # fmt: skip


@torch.no_grad()
def _written_out(target: Any, asked: Request) -> list[int]:
    """The paper's rule, token by token, with transformers as the model."""
    tokens = list(asked.prompt)
    penalty = asked.sampling.switch
    plain = SamplingParams(temperature=asked.sampling.temperature, top_k=asked.sampling.top_k)
    start = len(tokens)
    for _ in range(asked.max_tokens):
        at = len(tokens)
        logits = target(torch.tensor([tokens])).logits[0, -1:]
        if penalty is not None and at < start + penalty.beta:
            logits[0, list(penalty.tokens)] -= penalty.alpha
        rows = sampling_rows([plain], [asked.seed], torch.device("cpu"))
        token = int(pick(logits, rows, torch.tensor([at])))
        if penalty is not None and token in penalty.tokens:
            start = at
        tokens.append(token)
    return tokens[len(asked.prompt) :]


def test_the_stream_follows_the_formula(model: DecoderModel) -> None:
    requests = _requests(3) + _requests(11)[:5]
    requests = [Request(**{**_fields(r), "id": str(i)}) for i, r in enumerate(requests)]
    tokens, _ = run_all(_engine(model), requests)
    target = tiny_model(vocab_size=VOCAB)
    assert tokens == {asked.id: _written_out(target, asked) for asked in requests}


def _fields(asked: Request) -> dict[str, Any]:
    return {name: getattr(asked, name) for name in ("prompt", "sampling", "stop_ids", "max_tokens", "seed")}


@examples(15)
@given(
    seed=st.integers(0, 10_000),
    tree=st.builds(TreeShape, beams=st.integers(1, 4), length=st.integers(1, 5)),
    rows=st.integers(1, 8),
    blocks=st.sampled_from([16, 300]),
)
def test_speculation_emits_the_plain_stream(
    model: DecoderModel, head: Drafter, seed: int, tree: TreeShape, rows: int, blocks: int
) -> None:
    """Any tree shape, batch mix (rows with other penalties and with none), and preemption."""
    requests = _requests(seed)
    engine = _engine(model, head, tree, rows=rows, kv_blocks=blocks, block_size=8)
    assert run_all(engine, requests) == run_all(_engine(model), requests)


@given(
    said=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12), min_size=1, max_size=3),
    beams=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=3, max_size=3), min_size=1, max_size=4),
    penalty=st.sampled_from(PENALTIES),
)
def test_a_node_is_lowered_where_its_own_path_is_young(
    said: list[list[int]], beams: list[list[int]], penalty: SwitchPenalty
) -> None:
    """At every node of a tree against a walk along its path, from the last switch token back to the prompt's end."""
    rows = [Row(request=request("a", (5, 7, 1), switch=penalty), order=0, prefix=Prefix(tokens=(5, 7)),
                tokens=[5, 7, 1, *tokens]) for tokens in said]  # fmt: skip
    root = torch.tensor([row.tokens[-1] for row in rows])
    tree = build_tree(root, torch.tensor([beams] * len(rows)))
    logits = torch.zeros(*tree.tokens.shape, VOCAB)
    with penalised(logits, tree, switch_rows(rows, torch.device("cpu"))):
        lowered = logits.clone()
    assert not logits.any(), "they are the model's own again"
    for index, tokens in enumerate(said):
        for node in range(tree.tokens.shape[1]):
            path, at = [], node
            while at > 0:
                path.append(int(tree.tokens[index, at]))
                at = int(tree.parent[index, at])
            text = [*tokens, *reversed(path)]
            opened = max((place for place, token in enumerate(text) if token in penalty.tokens), default=0)
            young = len(text) - opened < penalty.beta
            expected = [-penalty.alpha * (young and token in penalty.tokens) for token in range(VOCAB)]
            assert lowered[index, node].tolist() == expected


def test_drafts_across_a_switch_are_accepted(model: DecoderModel, head: Drafter) -> None:
    """Without this, the property above could hold because no switch token ever stands inside an accepted draft."""
    penalty = SwitchPenalty(alpha=1.0, beta=3, tokens=tuple(range(0, VOCAB, 2)))
    prompts = random_prompts(1, [20] * 6, vocab=VOCAB)
    requests = [
        request(str(i), p, seed=i, max_tokens=100, temperature=0.5, switch=penalty) for i, p in enumerate(prompts)
    ]
    engine = _engine(model, head, TreeShape(beams=4, length=4))
    inside = 0
    for asked in requests:
        engine.submit(asked)
    while engine.has_work:
        inside += sum(token in penalty.tokens for output in engine.step() for token in output.tokens[:-1])
    assert inside > 20


def test_a_penalty_keeps_to_the_thought_until_beta(model: DecoderModel) -> None:
    """A prohibitive alpha lets the next switch come only beta tokens after the last one, and then it does come."""
    beta, tokens = 10, tuple(range(0, VOCAB, 2))
    penalty = SwitchPenalty(alpha=1e4, beta=beta, tokens=tokens)
    prompts = random_prompts(2, [5] * 8, vocab=VOCAB)

    def gaps(switch: SwitchPenalty | None) -> list[int]:
        requests = [request(str(i), p, seed=i, max_tokens=80, switch=switch) for i, p in enumerate(prompts)]
        streams, _ = run_all(_engine(model), requests)
        places = [[-1, *(at for at, token in enumerate(stream) if token in tokens)] for stream in streams.values()]
        return [b - max(a, 0) for line in places for a, b in pairwise(line)]

    assert min(gaps(None)) < beta
    held = gaps(penalty)
    assert min(held) == beta
    assert len(held) > 20


def test_appended_tokens_belong_to_the_thought(model: DecoderModel) -> None:
    """A held row that goes on after a switch token was appended is held to the thought which that one opened."""
    penalty = SwitchPenalty(alpha=1e4, beta=6, tokens=(0, 2, 4, 6, 8, 10))
    engine = _engine(model)
    asked = Request(**{**_fields(request("a", (1, 2, 3), max_tokens=12, switch=penalty)), "id": "a", "hold": True})
    engine.submit(asked)
    while engine.has_work:
        engine.step()
    engine.extend("a", [4], max_tokens=5)
    after: list[int] = []
    while engine.has_work:
        after += [token for output in engine.step() for token in output.tokens]
    engine.cancel("a")
    assert len(after) == 5
    assert not set(after) & set(penalty.tokens)


def test_what_cannot_be_is_refused(model: DecoderModel) -> None:
    with pytest.raises(RequestError) as caught:
        SwitchPenalty(alpha=-1, beta=0, tokens=())
    assert len(caught.value.offenders) == 3
    with pytest.raises(RequestError, match="vocabulary"):
        _engine(model).submit(request("a", (1,), switch=SwitchPenalty(alpha=1, beta=1, tokens=(VOCAB,))))


def _pieces(*known: str) -> tuple[Any, Any]:
    """A greedy longest-match tokenizer over ``known`` and single characters."""
    vocabulary = list(known) + [chr(i) for i in range(32, 127)]

    def encode(text: str) -> Sequence[int]:
        ids = []
        while text:
            piece = max((p for p in vocabulary if text.startswith(p)), key=len)
            ids.append(vocabulary.index(piece))
            text = text[len(piece) :]
        return ids

    return encode, lambda ids: "".join(vocabulary[i] for i in ids)


def test_words_become_first_pieces() -> None:
    encode, decode = _pieces("Alternatively", " Alternatively", "altern", " alternatively", " ")
    assert switch_tokens(encode, decode, SWITCH_WORDS) == (0, 1, 2, 3)
    encode, decode = _pieces("Wait")  # " Wait" is a blank and then the word
    assert switch_tokens(encode, decode, ("Wait",)) == (0,)


def test_a_word_in_crumbs_is_refused() -> None:
    encode, decode = _pieces("Wait", "Al")
    with pytest.raises(UsageError, match="piece 'Al'") as caught:
        switch_tokens(encode, decode, ("Wait", "Alternatively"))
    assert len(caught.value.offenders) == 2


def test_the_practice_tokenizer_knows_wait_and_not_alternatively() -> None:
    directory: Path = practice_dir()
    chat = load_chat(directory)
    penalty = read_switch_penalty("3,40,Wait", chat.encode, chat.decode)
    assert (penalty.alpha, penalty.beta, chat.decode(penalty.tokens)) == (3, 40, "Wait")
    with pytest.raises(UsageError, match="Alternatively"):
        switch_tokens(chat.encode, chat.decode)


def test_the_option_is_read() -> None:
    assert parse_switch_penalty("3,600") == (3.0, 600, SWITCH_WORDS)
    assert parse_switch_penalty("2.5, 60, Wait,Hmm") == (2.5, 60, ("Wait", "Hmm"))
    for wrong in ("", "3", "3,x", "x,600", "3,600,", "3,6.5"):
        with pytest.raises(UsageError, match="switch-penalty"):
            parse_switch_penalty(wrong)
