"""A whole decode step with the Triton attention, padded rows and all: the tokens of the pure-torch step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from drafter.config import DrafterConfig, TreeShape
from drafter.model import Drafter
from tests.engines import random_prompts, request, run_all
from tests.tiny import save_tiny
from trtkit.checkpoint.unified import open_unified
from trtkit.runtime.model import DecoderModel
from trtkit.runtime.torch_engine import TorchEngine
from trtkit.runtime.torch_options import Drafting, TorchLimits

pytest.importorskip("triton")


@torch.inference_mode()
@pytest.mark.parametrize("shape", [pytest.param(None, marks=pytest.mark.slow), TreeShape(beams=2, length=2)], ids=str)
def test_a_step_hands_the_kernels_what_they_need(
    tmp_path: Path, device: torch.device, shape: TreeShape | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trtkit.runtime.decode.attend_fits", lambda *_: True)
    directory = save_tiny(tmp_path, vocab_size=12)
    model = DecoderModel(open_unified(directory), device=device, dtype=torch.float32, max_tokens=80)
    head = Drafter(DrafterConfig(hidden_size=256, vocab_size=12, exit_dim=32)).to(device).eval().requires_grad_(False)
    requests = [request(str(i), p, seed=i, max_tokens=3) for i, p in enumerate(random_prompts(1, [3, 5, 18], vocab=12))]

    def tokens(triton: bool, drafting: Drafting | None) -> dict[str, list[int]]:
        model.triton = triton
        limits = TorchLimits(rows=3, total_tokens=60, kv_blocks=30, fixed_shapes=triton)
        return run_all(TorchEngine(model, limits, drafting), requests)[0]

    plain = tokens(False, None)
    assert tokens(True, None if shape is None else Drafting(head=head, trees=(shape,))) == plain
