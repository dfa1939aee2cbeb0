"""Which rows of a file calibrate and which judge, and what of them the model sees."""

from __future__ import annotations

import codecs
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.chat_files import save_chat_files, save_problems
from trtkit.build.calibration import CalibrationText, read_calibration
from trtkit.chat import VARIANTS, Chat, load_chat
from trtkit.errors import CheckpointError, InputError
from trtkit.quant.batches import TextRow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("chat")
    save_chat_files(directory)
    return directory


@pytest.fixture(scope="module")
def chat(place: Path) -> Chat:
    return load_chat(place)


def read(path: Path, chat: Chat, *, rows: int = 128, tokens: int = 512, vocab: int = 320) -> CalibrationText:
    return read_calibration(path, chat, rows=rows, tokens=tokens, vocab=vocab)


def lines(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def numbers(rows: Sequence[TextRow], chat: Chat) -> list[int]:
    """Which lines of ``save_problems`` they are."""
    return [int(chat.decode(row.tokens).split("What is ")[1].split(" +")[0]) for row in rows]


@pytest.mark.parametrize(("lines_there", "rows"), [(400, 128), (160, 128), (100, 128), (16, 128), (400, 8), (400, 1)])
def test_rows_that_judge_are_others_and_both_come_from_all_over_the_file(
    tmp_path: Path, chat: Chat, lines_there: int, rows: int
) -> None:
    """A file may be sorted by topic."""
    found = read(save_problems(tmp_path / "text.jsonl", lines_there), chat, rows=rows)
    calibration, held_out = numbers(found.calibration, chat), numbers(found.held_out, chat)
    assert not set(calibration) & set(held_out)
    assert len(set(calibration)) == len(calibration)
    assert len(held_out) >= 8
    assert len(held_out) == pytest.approx(max(8, len(calibration + held_out) / 5), abs=1)
    if lines_there >= rows + max(8, rows / 4):
        assert len(calibration) == pytest.approx(rows, abs=1), "as many as were asked for"
    else:
        assert len(calibration + held_out) == lines_there, "all there are"
    for kind in (calibration, held_out):
        if len(kind) >= 8:
            gaps = [after - before for before, after in zip([-1, *kind], [*kind, lines_there], strict=True)]
            assert max(gaps) <= 2 * lines_there / len(kind) + 1, "no part of the file is left out"


def test_of_a_large_file_only_the_rows_that_are_needed_are_read(
    tmp_path: Path, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """50 GB of OpenMathReasoning took ten times as much memory."""
    path = save_problems(tmp_path / "text.jsonl", 2300)
    text = path.read_bytes().splitlines(keepends=True)
    monkeypatch.setattr("trtkit.build.calibration._WHOLE_BYTES", 1000)
    path.write_bytes(codecs.BOM_UTF8 + b"".join([*text[:700], b"\n" * 700, *text[700:]]))
    again, found = read(path, chat), read(path, chat)
    assert again == found
    calibration, held_out = numbers(found.calibration, chat), numbers(found.held_out, chat)
    assert not set(calibration) & set(held_out)
    assert len(calibration) == pytest.approx(128, abs=2)
    for kind, gap in ((calibration, 60), (held_out, 180)):
        assert max(after - before for before, after in itertools.pairwise([0, *sorted(kind), 2300])) < gap
    path.write_bytes(b"".join([*text[:700], *(b"[%50d\n" % number for number in range(50)), *text[700:]]))
    with pytest.raises(InputError, match="malformed") as caught:
        read(path, chat)
    begin = int(caught.value.offenders[0].removeprefix(f"{path}: byte ").split(":")[0])
    assert path.read_bytes()[begin:].startswith(b"[  ")
    monkeypatch.setattr("trtkit.files._LONGEST_LINE", 5000)
    path.write_bytes(b"[" * 5001)
    with pytest.raises(InputError, match="a line of more than"):
        read(path, chat)


def test_a_problem_with_several_solutions_does_not_calibrate_and_judge(
    tmp_path: Path, chat: Chat, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"problem": f"What is {n // 3} +", "solution": f"Way {n % 3}."} for n in range(150)]
    found = read(lines(tmp_path / "text.jsonl", rows), chat)
    calibration, held_out = numbers(found.calibration, chat), numbers(found.held_out, chat)
    assert not set(calibration) & set(held_out)
    assert len(calibration) > 40
    assert len(held_out) >= 25
    assert not caplog.text
    few = read(lines(tmp_path / "few.jsonl", [{**row, "problem": "What is 1 +"} for row in rows]), chat)
    assert len(few.calibration) + len(few.held_out) == 150
    assert "few different problems" in caplog.text


def test_a_row_is_the_chat_turn_that_the_model_will_see(tmp_path: Path, place: Path, chat: Chat) -> None:
    rows: list[dict[str, Any]] = [{"problem": f"{n}?", "generated_solution": "<think>\nEasy.\n</think>\nYes"}
                                  for n in range(16)]  # fmt: skip
    rows[3] = {"question": "3?", "solution": "<think>\nEasy.\n</think>\nYes", "generated_solution": None}
    rows[5] = {"text": "A plain text.", "problem": " "}
    found = read(lines(tmp_path / "text.jsonl", rows), chat)
    tokenizer = AutoTokenizer.from_pretrained(place)
    seen = set()
    for row in found.calibration + found.held_out:
        text = tokenizer.decode(row.tokens)
        asked, answer = (tokenizer.decode(part) for part in
                         (row.tokens[: row.prompt_tokens], row.tokens[row.prompt_tokens :]))  # fmt: skip
        if "plain" in text:
            assert (text, row.prompt_tokens) == ("A plain text.<|im_end|>", 0)
            continue
        # The template has opened the thought, so the solution's own tag is not repeated.
        assert answer == "Easy.\n</think>\nYes<|im_end|>"
        assert asked.endswith("?<|im_end|>\n<|im_start|>assistant\n<think>\n")
        assert VARIANTS["solve"].user.split("{")[0] in asked
        seen.add(asked.split("?<|im_end|>")[0].rpartition(" ")[2])
    assert seen == {str(n) for n in range(16)} - {"5"}


def test_long_rows_are_cut(tmp_path: Path, chat: Chat) -> None:
    path = save_problems(tmp_path / "text.jsonl")
    with path.open("a", encoding="utf-8") as stream:
        stream.write("".join(json.dumps({"text": f"What is {n} +, at length?" * 9}) + "\n" for n in range(8)))
    whole, cut = read(path, chat), read(path, chat, tokens=100)
    for one, other in zip(whole.calibration + whole.held_out, cut.calibration + cut.held_out, strict=True):
        assert len(one.tokens) > 100
        assert other.tokens == one.tokens[:100]
        assert other.prompt_tokens == one.prompt_tokens


def test_every_unusable_line_is_named(tmp_path: Path, chat: Chat) -> None:
    good = {"problem": "1?", "generated_solution": "1"}
    bad = [{"problem": "1?"}, {"generated_solution": "1"}, {"text": " "}, {"problem": 3, "solution": "x"}]
    path = lines(tmp_path / "text.jsonl", [good] * 20 + bad)
    with pytest.raises(InputError, match="4 row") as caught:
        read(path, chat)
    assert caught.value.offenders == (
        f"{path}:21: no usable generated_solution", f"{path}:22: no usable problem",
        f"{path}:23: no usable problem and generated_solution", f"{path}:24: no usable problem",
    )  # fmt: skip
    with pytest.raises(InputError, match=r"only 15 row.*16 are needed"):
        read(lines(path, [good] * 15), chat)
    assert len(read(lines(path, [good] * 16), chat).held_out) == 8
    with pytest.raises(InputError, match="a Parquet file"):
        read(path.rename(tmp_path / "text.parquet"), chat)


def test_a_tokenizer_of_another_model_is_noticed(tmp_path: Path, chat: Chat) -> None:
    path = save_problems(tmp_path / "text.jsonl")
    read(path, chat, vocab=chat.size)
    with pytest.raises(CheckpointError, match="do not belong together"):
        read(path, chat, vocab=chat.size - 1)


def test_a_turn_ends_as_the_tokenizer_says_and_all_that_end_it_stop_a_sample(tmp_path: Path) -> None:
    """Llama 3's generation config names the end of a text first, and then that of a turn."""
    save_chat_files(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path))
    text, turn = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [text, turn]}))
    chat = load_chat(tmp_path)
    assert set(chat.eos_ids) == {text, turn}
    prompt = chat.prompt("1 + 1?", VARIANTS["solve"])
    assert chat.completion(prompt, "two")[-1] == turn
    assert chat.decode(chat.completion(prompt, "<think>\na\n</think>2")) == "a\n</think>2<|im_end|>"


def test_a_thought_that_the_template_leaves_closed_is_opened_by_the_solution(tmp_path: Path) -> None:
    save_chat_files(tmp_path)
    template = tmp_path / "chat_template.jinja"
    template.write_text(template.read_text().replace("<think>\n", ""))
    chat = load_chat(tmp_path)
    prompt = chat.prompt("1 + 1?", VARIANTS["solve"])
    assert chat.decode(prompt).endswith("assistant\n")
    assert chat.decode(chat.completion(prompt, "<think>\na\n</think>2")) == "<think>\na\n</think>2<|im_end|>"


def test_an_empty_system_turn_is_one(chat: Chat) -> None:
    """Qwen's template puts in a system turn of its own where a conversation has none."""
    said = {name: chat.decode(chat.prompt("1 + 1?", VARIANTS[name])) for name in ("nemotron", "solve")}
    assert said["nemotron"].startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user\nSolve the following")
    assert said["solve"].startswith("<|im_start|>user\n")
