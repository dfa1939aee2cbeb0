"""What was measured of a head is measured once, whatever interrupts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from drafter.config import DrafterConfig, TreeShape
from drafter.model import Drafter
from tests.training.small import small_training
from trtkit.training import run
from trtkit.training.evaluate import DepthHits, TreeResult
from trtkit.training.measures import Measures

CPU = torch.device("cpu")
HITS = DepthHits(part="all", top1=(0.1, 1 / 3), top5=(0.5, 0.25))
TREE = TreeResult(tree="1x2", temperature=1.0, tokens_per_step=4 / 3, all_accepted=0.5, accepted_by_depth=(0.7, 0.5))


def head(seed: int = 0) -> Drafter:
    torch.manual_seed(seed)
    return Drafter(DrafterConfig(hidden_size=4, vocab_size=6, exit_dim=8, num_draft_layers=1, rnn=True))


def never() -> Iterator[Any]:
    raise AssertionError("this part is there already")


def test_a_part_is_measured_once_and_read_as_it_was(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "trtkit")
    path = tmp_path / "measures.jsonl"
    first = Measures(path, head(), parts=2)
    assert first.part("hits", DepthHits, lambda: [HITS, HITS]) == (HITS, HITS)
    assert first.part("tree", TreeResult, lambda: [TREE]) == (TREE,)
    assert "there already" not in caplog.text
    again = Measures(path, head(), parts=3)
    assert again.part("hits", DepthHits, never) == (HITS, HITS)
    assert again.part("tree", TreeResult, never) == (TREE,)
    assert "measure: 2 of 3 parts are there already" in caplog.text
    assert again.part("other tree", TreeResult, list) == ()


@pytest.mark.parametrize("what", ["weight", "shape"])
def test_what_was_measured_of_another_head_counts_for_nothing(what: str, tmp_path: Path) -> None:
    path = tmp_path / "measures.jsonl"
    Measures(path, head(), parts=1).part("hits", DepthHits, lambda: [HITS])
    other = head()
    if what == "weight":
        with torch.no_grad():
            next(other.parameters()).flatten()[-1] += 1
    else:
        other = head(1)
    better = dataclasses.replace(HITS, top1=(1.0, 1.0))
    assert Measures(path, other, parts=1).part("hits", DepthHits, lambda: [better]) == (better,)
    assert Measures(path, head(), parts=1).part("hits", DepthHits, never) == (HITS,), "its own line is still there"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda line: line[: len(line) // 2],
        lambda line: "[]\n",
        lambda line: "\x00\xff\n",
        lambda line: line.replace('"top5"', '"top6"'),
        lambda line: json.dumps({**json.loads(line), "results": ["all"]}) + "\n",
        lambda line: json.dumps({**json.loads(line), "results": 3}) + "\n",
    ],
)
def test_a_damaged_line_is_measured_again(spoil: Callable[[str], str], tmp_path: Path) -> None:
    path = tmp_path / "measures.jsonl"
    Measures(path, head(), parts=1).part("hits", DepthHits, lambda: [HITS])
    path.write_text(spoil(path.read_text()) + "\n")
    assert Measures(path, head(), parts=1).part("hits", DepthHits, lambda: [HITS]) == (HITS,)
    assert Measures(path, head(), parts=1).part("hits", DepthHits, never) == (HITS,)


@pytest.mark.slow
def test_a_training_that_is_interrupted_while_it_measures_goes_on_behind_the_last_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trees = (TreeShape(beams=1, length=2), TreeShape(beams=2, length=2))
    _, plan = small_training(tmp_path, 12, own=False, max_tokens=120, epochs=2)
    plan = dataclasses.replace(plan, trees=trees)
    whole = run.train_head(plan, tmp_path / "whole", device=CPU)
    measure_tree, asked = run.measure_tree, list[tuple[str, float]]()

    def interrupted_at_the_third(*given: Any, tree: TreeShape, temperature: float, **more: Any) -> TreeResult:
        asked.append((str(tree), temperature))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return measure_tree(*given, tree=tree, temperature=temperature, **more)

    monkeypatch.setattr(run, "measure_tree", interrupted_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run.train_head(plan, tmp_path / "out", device=CPU)
    monkeypatch.setattr(run, "hits_by_depth", never)
    again = run.train_head(plan, tmp_path / "out", device=CPU)
    assert asked == [("1x2", 0.0), ("1x2", 1.0), ("2x2", 0.0), ("2x2", 0.0), ("2x2", 1.0)]
    assert again == whole, "as if nothing had happened"
    files = [tmp_path / name / "training.json" for name in ("whole", "out")]
    assert files[0].read_text() == files[1].read_text()
    assert run.train_head(plan, tmp_path / "out", device=CPU) == whole
    assert len(asked) == 5, "a finished head is not measured again either"


def test_a_head_that_is_trained_anew_is_measured_anew(tmp_path: Path) -> None:
    _, plan = small_training(tmp_path, 12, own=False, max_tokens=120)
    plan = dataclasses.replace(plan, trees=(TreeShape(beams=1, length=2),))
    out = tmp_path / "out"
    run.train_head(plan, out, device=CPU)
    kept = (out / "work" / "measures.jsonl").read_text().splitlines()
    for path in (out / "config.json", out / "work" / "state.pt", out / "work" / "samples.jsonl"):
        path.unlink()
    run.train_head(dataclasses.replace(plan, rate=0.1, epochs=4), out, device=CPU)
    assert len((out / "work" / "measures.jsonl").read_text().splitlines()) == 2 * len(kept) == 6
