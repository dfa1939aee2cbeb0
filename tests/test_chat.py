"""Prompts, completions and the ids that end a turn, with a real tokenizer of bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.chat_files import save_chat_files
from trtkit.chat import VARIANTS, Chat, load_chat, variant_named
from trtkit.errors import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("chat")
    save_chat_files(directory)
    return directory


def changed(files: Path, directory: Path, **settings: object) -> Path:
    """The tokenizer with other settings."""
    for path in files.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        path = directory / name
        if name.endswith(".jinja") and "chat_template" in settings:
            path.unlink(missing_ok=True)
        elif name.endswith(".json"):
            told = {**json.loads(path.read_text("utf-8")), **settings}
            path.write_text(json.dumps({key: value for key, value in told.items() if value is not None}), "utf-8")
    return directory


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def test_a_problem_is_asked_as_its_variant_says(files: Path) -> None:
    chat = load_chat(files)
    problem = "Is {x} = {problem}?"  # braces of its own are no places to fill
    answer = "<|im_start|>assistant\n<think>\n"
    asked = chat.decode(chat.prompt(problem, VARIANTS["solve"]))
    assert asked == turn("user", f"Solve the problem, and put the answer in \\boxed{{}}. {problem}") + answer
    with_system = chat.decode(chat.prompt(problem, VARIANTS["system"]))
    assert with_system == turn("system", VARIANTS["system"].system or "") + turn("user", problem) + answer
    empty_system = chat.decode(chat.prompt(problem, VARIANTS["nemotron"]))
    assert empty_system.startswith(turn("system", "") + "<|im_start|>user\n")
    assert all(variant.user.count("{problem}") == 1 for variant in VARIANTS.values())


@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize("solution", ["<think>\nSo 2.\n</think>\n\\boxed{2}", "\\boxed{2}"])
def test_a_solution_goes_on_where_the_prompt_ends(files: Path, tmp_path: Path, opened: bool, solution: str) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}" + ("<think>\n" if opened else "\n")
    chat = load_chat(changed(files, tmp_path, chat_template=template))
    prompt = chat.prompt("1 + 1?", VARIANTS["system"])
    completion = chat.completion(prompt, f"\n{solution}")
    assert completion[-1] == chat.eos_ids[0]
    said = chat.decode(completion[:-1])
    thinks = solution.startswith("<think>")
    assert said == (solution.removeprefix("<think>\n") if opened and thinks else f"\n{solution}")


def test_ids_to_text_and_back(files: Path) -> None:
    chat = load_chat(files)
    text = "so <think>b</think> is  1 , and n't \\frac12"
    assert chat.decode(chat.encode(text)) == text
    assert (len(chat.think_end), chat.decode(chat.think_end)) == (1, "</think>")
    assert chat.size == 261


def test_nothing_is_added_around_parts_of_an_answer(files: Path, tmp_path: Path) -> None:
    """Llama's tokenizer begins every text with an id of its own unless it is told not to."""
    directory = changed(files, tmp_path)
    path = directory / "tokenizer.json"
    begin = {"id": "<|endoftext|>", "ids": [256], "tokens": ["<|endoftext|>"]}
    sequence = [{"SpecialToken": {"id": begin["id"], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    processor = {
        "type": "TemplateProcessing",
        "single": sequence,
        "pair": [*sequence, {"Sequence": {"id": "B", "type_id": 0}}],
    }
    told = {
        **json.loads(path.read_text("utf-8")),
        "post_processor": {**processor, "special_tokens": {begin["id"]: begin}},
    }
    path.write_text(json.dumps(told), "utf-8")
    chat, plain = load_chat(directory), load_chat(files)
    assert chat.encode("x") == plain.encode("x")
    assert chat.completion((), "x") == plain.completion((), "x")
    assert chat.think_end == plain.think_end
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(str(directory)).encode("x")[0] == 256, "it would"


@pytest.mark.parametrize(
    ("listed", "wanted"),
    [(None, []), (7, [7]), ([9, 8, 9], [9, 8]), ("<|end|>", [])],
    ids=["no entry", "one", "several", "a name"],
)
def test_the_tokenizers_own_end_comes_first(files: Path, tmp_path: Path, listed: object, wanted: list[int]) -> None:
    directory = changed(files, tmp_path)
    own = load_chat(directory).eos_ids[0]
    (directory / "generation_config.json").write_text(json.dumps({} if listed is None else {"eos_token_id": listed}))
    chat = load_chat(directory)
    assert chat.eos_ids == (own, *wanted)
    assert chat.decode([own]) == "<|im_end|>"
    assert chat.completion((), "x") == (*chat.encode("x"), own)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, own]}))
    assert load_chat(directory).eos_ids == (own, 9)


def test_a_tokenizer_without_an_end_has_those_of_the_generation(files: Path, tmp_path: Path) -> None:
    directory = changed(files, tmp_path, eos_token=None)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [9]}))
    chat = load_chat(directory)
    assert chat.eos_ids == (9,)
    (directory / "generation_config.json").unlink()
    nothing = load_chat(directory)
    assert nothing.completion(nothing.encode("x"), "y") == nothing.encode("y")


def test_another_template_has_another_digest(files: Path, tmp_path: Path) -> None:
    (tmp_path / "same").mkdir()
    (tmp_path / "other").mkdir()
    other = changed(files, tmp_path / "other", chat_template="{{ messages[0].content }}")
    chats = [load_chat(place) for place in (files, changed(files, tmp_path / "same"), other)]
    first, same, changes = (chat.template_digest for chat in chats)
    assert first == same != changes


def test_what_a_checkpoint_lacks_is_named(files: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer found") as nothing:
        load_chat(tmp_path)
    assert "tokenizer.json" in (nothing.value.hint or "")
    directory = changed(files, tmp_path, chat_template=None)
    with pytest.raises(CheckpointError, match="no chat template") as plain:
        load_chat(directory)
    assert plain.value.where == str(directory)
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_chat(directory)


def test_variants_by_name() -> None:
    assert variant_named("reason") is VARIANTS["reason"]
    with pytest.raises(ConfigError, match="did you mean 'reason'") as caught:
        variant_named("reson")
    assert "nemotron" in (caught.value.hint or "")


def test_an_end_of_thought_in_several_ids_is_known() -> None:
    class Plain:
        chat_template = "no word of a thought"

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            assert not add_special_tokens
            return list(text.encode())

    assert Chat(Plain(), [3, 3, 4]).think_end == tuple(b"</think>")
    assert Chat(Plain(), [3, 3, 4]).eos_ids == (3, 4)
