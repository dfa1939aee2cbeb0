"""Log-probabilities of the emitted tokens are those that transformers gives to the same text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from drafter.config import DrafterConfig, TreeShape
from drafter.model import Drafter
from tests.engines import random_prompts, request
from tests.tiny import save_tiny, tiny_model
from trtkit.checkpoint.unified import open_unified
from trtkit.runtime.api import Engine, Request, SwitchPenalty
from trtkit.runtime.model import DecoderModel
from trtkit.runtime.torch_engine import TorchEngine
from trtkit.runtime.torch_options import Drafting, TorchLimits

VOCAB = 12


def scored(engine: Engine, requests: Iterable[Request]) -> dict[str, tuple[list[int], list[float]]]:
    """Tokens and their log-probabilities by request."""
    said: dict[str, tuple[list[int], list[float]]] = {}
    for each in requests:
        engine.submit(each)
        said[each.id] = ([], [])
    while engine.has_work:
        for output in engine.step():
            said[output.request_id][0].extend(output.tokens)
            said[output.request_id][1].extend(output.logprobs)
    return said


@pytest.mark.parametrize("tree", [None, TreeShape(beams=1, length=3), TreeShape(beams=3, length=2)])
def test_they_are_those_of_transformers(tmp_path: Path, tree: TreeShape | None) -> None:
    model = DecoderModel(
        open_unified(save_tiny(tmp_path / "m", vocab_size=VOCAB)),
        device=torch.device("cpu"), dtype=torch.float32, max_tokens=300,
    )  # fmt: skip
    torch.manual_seed(5)
    head = Drafter(DrafterConfig(hidden_size=256, vocab_size=VOCAB, exit_dim=32))
    drafting = None if tree is None else Drafting(head=head, trees=(tree,))
    prompts = random_prompts(3, [1, 17, 40], VOCAB)
    requests = [
        dataclasses.replace(
            request(
                str(i),
                prompt,
                seed=i,
                temperature=(0.0, 0.7, 1.0)[i],
                top_p=(1.0, 0.8, 1.0)[i],
                stop_ids=(5,),
                switch=SwitchPenalty(alpha=2.0, beta=9, tokens=(0, 1, 2, 3)) if i == 2 else None,
            ),
            logprobs=i != 1,
        )
        for i, prompt in enumerate(prompts)
    ]
    with TorchEngine(model, TorchLimits(rows=4, total_tokens=128, kv_blocks=64), drafting) as engine:
        said = scored(engine, requests)
    assert said["1"][1] == [], "only where they were asked for"
    reference = tiny_model(vocab_size=VOCAB)
    for name in ("0", "2"):
        prompt, (tokens, logprobs) = prompts[int(name)], said[name]
        with torch.no_grad():
            logits = reference(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        wanted = logits.log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)]
        assert logprobs == pytest.approx(wanted.tolist(), abs=1e-4)
