"""A difficulty regressor end to end on a tiny ModernBERT: learns what the text says, refused when that is nothing."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.chat_files import save_chat_files
from tests.tiny import save_tiny
from tests.tiny_modernbert import practice_texts, save_tiny_modernbert, tokens_needed
from trtkit.difficulty import HeldOut, Labelled, Units, load_network, load_regressor
from trtkit.errors import CheckpointError, InputError, OutputError, QualityError
from trtkit.solve.difficulty import predict_tokens
from trtkit.solve.problems import Problem
from trtkit.training.difficulty import (
    DifficultyPlan,
    DifficultyReport,
    merge_labels,
    read_labels,
    split,
    train_difficulty,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_modernbert(tmp_path_factory.mktemp("base"))


def _labels(tokens: Sequence[float] | None = None) -> list[Labelled]:
    texts = practice_texts()
    wanted = tokens or [tokens_needed(text) for text in texts]
    return [Labelled(problem=text, tokens=count) for text, count in zip(texts, wanted, strict=True)]


def _train(base: Path, labels: Sequence[Labelled], out: Path, *, epochs: float = 8, seed: int = 0) -> DifficultyReport:
    plan = DifficultyPlan(model=str(base), epochs=epochs, rate=1e-3, seed=seed)
    return train_difficulty(plan, labels, out, device=CPU)


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DifficultyReport]:
    out = tmp_path_factory.mktemp("trained") / "difficulty"
    return out, _train(base, _labels(), out)


def test_it_learns_what_the_text_says(trained: tuple[Path, DifficultyReport]) -> None:
    out, report = trained
    assert report.usable
    assert report.held_out.error < 0.4 * report.held_out.error_of_mean
    assert report.held_out.rank_correlation > 0.8
    assert report.held_out.off_by_tokens < report.held_out.mean_off_by_tokens
    assert {"config.json", "model.safetensors", "tokenizer.json", "difficulty.json", "metrics.jsonl"} <= {
        path.name for path in out.iterdir()
    }
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.5 * losses[0]


def test_other_devices_are_left_alone(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be full with an engine that solves meanwhile."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *_: pytest.fail("a GPU was set up"))
    before = torch.get_rng_state()
    _train(base, _labels(), tmp_path / "out", epochs=0.1)
    assert torch.equal(torch.get_rng_state(), before)


def test_saved_predictions_are_the_reported_ones(trained: tuple[Path, DifficultyReport]) -> None:
    """The figures of the report, computed again from the saved directory and the problems that were held out."""
    out, report = trained
    kept, held = split(_labels(), 0.2, seed=0)
    guesses = predict_tokens(out, [Problem(id=str(i), text=label.problem) for i, label in enumerate(held)])
    assert list(guesses) == [str(i) for i in range(len(held))]
    factor = load_regressor(out).units.factor
    logs = np.log([label.tokens for label in held])
    errors = (np.log(list(guesses.values())) - np.log(factor) - logs) ** 2
    assert np.isclose(errors.mean(), report.held_out.error, rtol=1e-4)
    of_mean = (np.mean(np.log([label.tokens for label in kept])) - logs) ** 2
    assert np.isclose(of_mean.mean(), report.held_out.error_of_mean)
    assert np.isclose((of_mean - errors).std(ddof=1) / len(held) ** 0.5, report.held_out.gain_error, rtol=1e-3)
    tokens, said = np.array([label.tokens for label in held]), np.array(list(guesses.values()))
    assert np.isclose(np.mean(said), np.mean(tokens), rtol=1e-4)
    assert np.isclose(np.sqrt(np.mean((said - tokens) ** 2)), report.held_out.off_by_tokens, rtol=1e-3)
    mean = np.mean([label.tokens for label in kept])
    assert np.isclose(np.sqrt(np.mean((mean - tokens) ** 2)), report.held_out.mean_off_by_tokens)
    assert len(set(tokens)) < len(tokens), "equal values share a rank"
    ranks = [[np.sum(values < v) + (np.sum(values == v) + 1) / 2 for v in values] for values in (tokens, said)]
    assert np.isclose(np.corrcoef(ranks)[0, 1], report.held_out.rank_correlation, atol=1e-3)


def test_a_problems_guess_does_not_depend_on_the_others(trained: tuple[Path, DifficultyReport]) -> None:
    """Neither padding nor the sorting by length may show."""
    texts = practice_texts()[:40]
    together = load_regressor(trained[0]).predict(texts)
    alone = [load_regressor(trained[0]).predict([text])[0] for text in texts[:4]]
    assert together[:4] == pytest.approx(alone, rel=1e-4)
    assert load_regressor(trained[0]).predict([]) == []
    # More than it sees, and more than the network has positions for.
    few, many = load_regressor(trained[0]).predict(["Compute gcd(4, 6). " * times for times in (100, 200)])
    assert few == pytest.approx(many, rel=1e-4)


def test_the_same_seed_gives_the_same_network(
    base: Path, trained: tuple[Path, DifficultyReport], tmp_path: Path
) -> None:
    first = _train(base, _labels(), tmp_path / "a", epochs=1)
    random.random(), torch.rand(3)
    second = _train(base, list(reversed(_labels())), tmp_path / "b", epochs=1)  # the order of the rows is no part of it
    other = _train(base, _labels(), tmp_path / "c", epochs=1, seed=1)
    assert first == second != other
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_labels_that_the_text_does_not_tell_are_refused(base: Path, tmp_path: Path) -> None:
    shuffled = [tokens_needed(text) for text in practice_texts()]
    random.Random(1).shuffle(shuffled)
    report = _train(base, _labels(shuffled), tmp_path / "d", epochs=3)
    assert not report.usable
    assert json.loads((tmp_path / "d" / "difficulty.json").read_text())["usable"] is False
    with pytest.raises(QualityError, match="no better than guessing the mean"):
        load_regressor(tmp_path / "d")
    with pytest.raises(QualityError):
        predict_tokens(tmp_path / "d", [Problem(id="1", text="Compute gcd(4, 6).")])


def test_a_lucky_draw_is_not_enough() -> None:
    """A gain within its own standard error may be chance."""

    def held(gain: float) -> HeldOut:
        return HeldOut(
            problems=20, error=1 - gain, error_of_mean=1.0, gain_error=0.1, rank_correlation=0.2, off_by_tokens=1.0,
            mean_off_by_tokens=1.0,
        )  # fmt: skip

    assert [held(gain).usable for gain in (-0.5, 0.0, 0.09, 0.11)] == [False, False, False, True]


def test_units_invert() -> None:
    units = Units(centre=8.0, spread=0.5, factor=1.25)
    assert units.tokens(units.target(4321.0)) == pytest.approx(1.25 * 4321.0)
    assert units.tokens(1e9) < 1e6


def test_problems_are_split_by_text() -> None:
    labels = _labels()
    kept, held = split(labels, 0.25, seed=3)
    assert len(held) == round(0.25 * len(labels))
    assert not {label.problem for label in kept} & {label.problem for label in held}
    again = split(random.Random(0).sample(labels, len(labels)), 0.25, seed=3)
    assert {label.problem for label in again[1]} == {label.problem for label in held}
    merged = merge_labels(
        [Labelled(problem="a", tokens=10, samples=3), Labelled(problem="b", tokens=1), Labelled(problem="a", tokens=50)]
    )
    assert merged == [Labelled(problem="a", tokens=20, samples=4), Labelled(problem="b", tokens=1)]


def test_what_cannot_be_is_refused(base: Path, trained: tuple[Path, DifficultyReport], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="too few"):
        _train(base, _labels()[:15], tmp_path / "x")
    with pytest.raises(InputError, match="same number of tokens"):
        _train(base, _labels([7.0] * len(practice_texts())), tmp_path / "x")
    with pytest.raises(OutputError, match="already exists"):
        _train(base, _labels(), trained[0])
    with pytest.raises(CheckpointError, match=r"no difficulty\.json"):
        load_regressor(base)
    with pytest.raises(QualityError, match=r"the loss is nan.*"):
        train_difficulty(DifficultyPlan(model=str(base), epochs=0.01, rate=1e10), _labels(), tmp_path / "x", device=CPU)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="text classifier"):
        _train(broken, _labels(), tmp_path / "x")
    (broken / "difficulty.json").write_text('{"version": 1, "units": {}}')
    with pytest.raises(CheckpointError, match="incomplete"):
        load_regressor(broken)
    newer = json.loads((trained[0] / "difficulty.json").read_text()) | {"version": 2}
    (broken / "difficulty.json").write_text(json.dumps(newer))
    with pytest.raises(CheckpointError, match="format 2, this trtkit reads 1"):
        load_regressor(broken)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_decoder_is_refused(tmp_path: Path) -> None:
    save_chat_files(save_tiny(tmp_path))
    with pytest.raises(CheckpointError, match="there is no padding token"):
        load_network(tmp_path)


def test_rows_are_read_and_every_bad_one_is_named(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"problem": "1+1?", "tokens": 12}\n\n{"problem": "2+2?", "tokens": 1.5}\n')
    assert read_labels(rows) == [Labelled(problem="1+1?", tokens=12.0), Labelled(problem="2+2?", tokens=1.5)]
    rows.write_text('{"problem": " ", "tokens": 1}\n{"problem": "a", "tokens": 0}\n{"problem": "b", "tokens": "9"}\n')
    with pytest.raises(InputError) as caught:
        read_labels(rows)
    assert len(caught.value.offenders) == 3
