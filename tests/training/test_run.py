"""Training a head end to end on a tiny model, and the engine that is built with it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from drafter.checkpoint import load_drafter
from drafter.config import TreeShape
from drafter.data import Sample, Window
from tests.chat_files import save_chat_files, save_problems
from tests.engines import random_prompts, request, run_all
from tests.tiny import save_tiny, tiny_model
from trtkit.build.native import build_native
from trtkit.checkpoint.unified import open_unified
from trtkit.errors import InputError, UnsupportedError, UsageError
from trtkit.recipe import Limits, Recipe
from trtkit.runtime.load import OpenOptions, open_engine
from trtkit.runtime.model import DecoderModel
from trtkit.training.publish import token_order
from trtkit.training.rows import read_rows
from trtkit.training.run import TrainingPlan, train_head
from trtkit.training.target import draft_batch

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_tiny(directory, max_position_embeddings=160)
    save_chat_files(directory)
    save_problems(directory / "calibration.jsonl")
    return directory


def _plan(model_dir: Path, **changes: object) -> TrainingPlan:
    plan = TrainingPlan(
        model=str(model_dir), data=str(model_dir / "calibration.jsonl"), rows=14, held_out=0.2, exit_dim=64, depths=3,
        tokens_per_part=400, epochs=3, max_tokens=140, trees=(TreeShape(beams=2, length=2),),
    )  # fmt: skip
    return dataclasses.replace(plan, **changes)


@pytest.fixture(scope="module")
def head_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("head")
    train_head(_plan(model_dir), out, device=CPU)
    return out


def test_hidden_states_are_those_of_transformers(model_dir: Path) -> None:
    model = DecoderModel(open_unified(model_dir), device=CPU, dtype=torch.float32, max_tokens=160)
    texts = random_prompts(0, [30, 50])
    samples = [Sample(problem="p", tokens=text, prompt=10) for text in texts]
    batch = draft_batch(model, [Window(sample=s, start=20, end=len(s.tokens)) for s in samples])
    target = tiny_model(max_position_embeddings=160)
    wanted = torch.cat([target.model(torch.tensor([text])).last_hidden_state[0, 20:] for text in texts])
    torch.testing.assert_close(batch.hidden, wanted.detach(), rtol=0, atol=1e-4)
    assert batch.tokens.tolist() == [*texts[0][20:], *texts[1][20:]]
    assert batch.segment.tolist() == [0] * 10 + [1] * 30
    assert bool(batch.scored.all())


def test_a_head_is_trained_published_and_measured(head_dir: Path) -> None:
    head = load_drafter(head_dir, dtype=torch.float32, device=CPU)
    assert head.config.exit_dim == 64
    training = json.loads((head_dir / "training.json").read_text())
    report = training["report"]
    assert [tree["tree"] for tree in report["trees"]] == ["2x2", "2x2"]
    assert all(tree["tokens_per_step"] >= 1 for tree in report["trees"])
    assert report["hits"][0]["part"] == "all"
    curve = [json.loads(line) for line in (head_dir / "metrics.jsonl").read_text().splitlines()]
    assert curve[-1]["update"] == report["updates"]


def test_the_rows_own_solutions_can_be_the_text(model_dir: Path, tmp_path: Path) -> None:
    report = train_head(_plan(model_dir, own=False, epochs=4.0, rate=0.004, trees=()), tmp_path, device=CPU)
    assert report is not None
    # All solutions follow one pattern, so even this head learns most of it.
    assert report.hits[0].top1[0] > 0.3


def test_training_goes_on_from_a_trained_head(model_dir: Path, head_dir: Path, tmp_path: Path) -> None:
    report = train_head(_plan(model_dir, start_from=str(head_dir), epochs=0.1, rate=1e-6), tmp_path, device=CPU)
    assert report is not None
    first, again = (
        load_drafter(directory, dtype=torch.float32, device=CPU).state_dict() for directory in (head_dir, tmp_path)
    )
    assert first.keys() == again.keys()
    for name, weight in first.items():
        torch.testing.assert_close(again[name], weight, atol=2e-2, rtol=2e-2)


@pytest.mark.slow
def test_two_processes_train_the_head_that_one_does(model_dir: Path, tmp_path: Path) -> None:
    """The command line under torchrun, gloo on the CPU: the same curve as one process with the same two parts."""
    rows = save_problems(tmp_path / "rows.jsonl", 60)
    arguments = [
        "-m", "trtkit.cli", "train-drafter", "--model", str(model_dir), "--problems",
        str(rows), "--rows", "60", "--exit-dim", "64", "--batch-tokens", "200", "--parts",
        "2", "--epochs", "3", "--max-tokens", "140", "--device", "cpu", "--threads", "1", "--window", "64",
    ]  # fmt: skip
    alone = [sys.executable, *arguments, "--out", str(tmp_path / "one")]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    shared = [sys.executable, *launcher, *arguments, "--out", str(tmp_path / "two")]
    for command in (alone, shared):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert done.stdout.count("next:") == 1, "only the first process speaks"
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [line["update"] for line in one] == [line["update"] for line in two]
    for mine, theirs in zip(one, two, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=2e-2)


def test_an_update_that_cannot_be_shared_out_is_refused(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="over 2 processes"):
        train_head(_plan(model_dir), tmp_path, device=CPU)


def test_the_most_frequent_tokens_come_first() -> None:
    samples = [
        Sample(problem="a", tokens=(9, 9, 9, 4, 4, 2), prompt=3),
        Sample(problem="b", tokens=(9, 7, 4, 2), prompt=1),
    ]
    assert token_order(samples, 10).tolist() == [4, 2, 7, 0, 1, 3, 5, 6, 8, 9]


def test_another_training_in_the_same_place_is_refused(model_dir: Path, head_dir: Path) -> None:
    with pytest.raises(UsageError, match=r"rate: 0\.001 there, 0\.5 now"):
        train_head(_plan(model_dir, rate=0.5), head_dir, device=CPU)


def test_a_head_to_go_on_from_is_looked_at_before_the_model_writes_its_answers(
    model_dir: Path, head_dir: Path, tmp_path: Path
) -> None:
    for path in head_dir.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    training = json.loads((tmp_path / "training.json").read_text())
    (tmp_path / "training.json").write_text(json.dumps({**training, "chat_template_sha256": "another"}))
    with pytest.raises(UnsupportedError, match="belongs to another model"):
        train_head(_plan(model_dir, start_from=str(tmp_path)), tmp_path / "out", device=CPU)
    assert not (tmp_path / "out").exists(), "answers take hours"


def test_an_engine_with_the_head_says_what_the_plain_one_says(model_dir: Path, head_dir: Path, tmp_path: Path) -> None:
    limits = Limits(batch=8, prompt_tokens=64, total_tokens=128)
    recipe = Recipe(model=str(model_dir), precision="int8", limits=limits, tree=TreeShape(beams=2, length=3))
    manifest = build_native(recipe, tmp_path / "engine", drafter=head_dir)
    assert "drafter/model.safetensors" in manifest.checkpoint_digest
    requests = [request(str(i), p, seed=i, max_tokens=40) for i, p in enumerate(random_prompts(1, [5, 20, 20]))]
    tokens = []
    for speculative in (False, True):
        options = OpenOptions(device="cpu", dtype="float32", speculative=speculative)
        with open_engine(tmp_path / "engine", options) as engine:
            tokens.append(run_all(engine, requests))
            assert bool(engine.stats().accepted_by_depth) is speculative
    assert tokens[0] == tokens[1]


def test_a_head_of_another_model_or_template_is_refused(model_dir: Path, head_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    save_tiny(other, vocab_size=512)
    save_chat_files(other)
    config = json.loads((other / "tokenizer_config.json").read_text())
    template = other / "chat_template.jinja"
    if template.is_file():
        template.write_text(template.read_text() + "{# changed #}")
    else:
        config["chat_template"] += "{# changed #}"
        (other / "tokenizer_config.json").write_text(json.dumps(config))
    recipe = Recipe(model=str(other), precision="int8", tree=TreeShape(beams=1, length=3))
    with pytest.raises(UnsupportedError) as caught:
        build_native(recipe, tmp_path / "engine", drafter=head_dir)
    assert "vocabulary: 320 in the head, 512 in the model" in caught.value.offenders
    assert any("chat template" in line for line in caught.value.offenders)
    assert not (tmp_path / "engine").exists()


def test_rows_are_filtered_and_one_per_problem(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [
        {"problem": "a", "generated_solution": "x", "problem_type": "has_answer_extracted"},
        {"problem": "a", "generated_solution": "y"},
        {"problem": "b", "generated_solution": "z", "problem_type": "converted_proof"},
        {"question": "c", "solution": "w", "problem_type": None},
        {"problem": "d"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [(r.problem, r.solution) for r in read_rows(str(path), count=9)] == [("a", "x"), ("c", "w")]
    assert [r.problem for r in read_rows(str(path), count=9, solutions=False)] == ["a", "c", "d"]
    with path.open("a") as stream:
        stream.write("{broken\n")
    assert len(read_rows(str(path), count=2)) == 2, "no more is read than is needed"
    with pytest.raises(InputError, match="1 malformed") as caught:
        read_rows(str(path), count=9)
    assert caught.value.offenders[0].startswith(f"{path}:6: not valid JSON")
    path.write_text('{"text": "no problem here"}\n')
    with pytest.raises(InputError, match="no usable rows"):
        read_rows(str(path), count=9)
