"""Long prompts go through the model in passes of bounded size; what the passes compute is tested with the engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from trtkit.runtime import prefill as room
from trtkit.runtime.prefill import Stretch, prefill


@pytest.mark.parametrize("lengths", [[3], [5], [12], [2, 2, 2], [4, 0, 9, 1]])
def test_passes_are_full_and_every_token_is_in_one(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "PREFILL_TOKENS", 5)
    passes: list[list[tuple[int, int]]] = []

    def forward(tokens: torch.Tensor, positions: torch.Tensor, attend: Any) -> None:
        passes.append(list(zip(tokens.tolist(), positions.tolist(), strict=True)))

    stretches = [
        Stretch(tokens=list(range(100 * number, 100 * number + length)), cached=number, blocks=range(20))
        for number, length in enumerate(lengths)
    ]
    model = SimpleNamespace(device=torch.device("cpu"), native=False, forward=forward)
    cache = SimpleNamespace(block_size=2)
    prefill(cast(Any, model), cast(Any, cache), stretches)
    wanted = [(100 * number + i, number + i) for number, length in enumerate(lengths) for i in range(length)]
    assert [pair for each in passes for pair in each] == wanted
    assert [len(each) for each in passes] == [min(5, len(wanted) - at) for at in range(0, len(wanted), 5)]
