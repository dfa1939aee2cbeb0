"""Reading what others wrote, and files that are whole or not there."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from trtkit.errors import ConfigError, InputError, OutputError
from trtkit.files import append_jsonl, cache_home, nearest, read_json, read_jsonl, read_toml, write_text
from trtkit.staging import staged_dir


@pytest.mark.parametrize("value", ["1" * 5000, "[" * 100_000], ids=["digits", "depth"])
def test_json_that_python_cannot_hold_is_an_error_with_its_place(tmp_path: Path, value: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"a": 1}}\n{{"a": {value}}}\n{{"a": 2}}\n')
    with pytest.raises(InputError) as caught:
        read_jsonl(path)
    assert [offender.rpartition(": not valid")[0] for offender in caught.value.offenders] == [f"{path}:2"]
    path.write_text(f'{{"a": {value}}}')
    with pytest.raises(ConfigError, match="not valid JSON"):
        read_json(path)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_a_byte_that_is_no_utf8_is_named_with_its_line(tmp_path: Path, mark: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(mark + b'{"a": 1}\n\xfe')
    with pytest.raises(InputError, match="byte 0xfe") as caught:
        read_jsonl(path)
    assert caught.value.where == f"{path}:2"


def test_a_file_that_is_not_there_comes_with_what_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def hint(name: str) -> str | None:
        with pytest.raises(InputError, match="no such file") as caught:
            read_jsonl(Path(name))
        return caught.value.hint

    assert hint("a/b.jsonl") == "there is no directory a"
    assert hint("omr.jsonl") == f"it was looked for from {tmp_path}"
    assert hint(str(tmp_path / "omr.jsonl")) is None
    (tmp_path / "others.jsonl").mkdir()
    for name in "cabdef":
        Path(f"rows-{name * 9}.JSONL").touch()
    assert hint("row-aaaaaaaaa.JSONL") == "did you mean rows-aaaaaaaaa.JSONL?"
    shown = ", ".join(f"rows-{name * 9}.JSONL" for name in "abcde")
    assert hint("omr.jsonl") == f"in {tmp_path} there are: {shown}, ..."
    assert hint("omr.json") == f"it was looked for from {tmp_path}"
    Path("generation_config.json").touch()
    assert hint("config.json") == f"it was looked for from {tmp_path}", "something else, not a slip of the pen"
    monkeypatch.setattr(Path, "iterdir", lambda _: (_ for _ in ()).throw(PermissionError()))
    assert hint("omr.jsonl") is None


def test_what_is_no_document_is_named_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(ConfigError, match="no such file") as caught:
        read_json(path)
    assert caught.value.where == str(path)
    with pytest.raises(InputError, match="cannot be read: Is a directory") as wrong:
        read_jsonl(tmp_path)
    assert wrong.value.where == str(tmp_path)
    path.write_text('{"a": 1,\n "b" 2}')
    with pytest.raises(InputError, match="not valid JSON: Expecting ':'") as broken:
        read_json(path, InputError)
    assert broken.value.where == f"{path}:2"
    path.write_text("[1]")
    with pytest.raises(ConfigError, match="expected a JSON object") as listed:
        read_json(path)
    assert listed.value.where == str(path)
    path.write_text("a = ")
    with pytest.raises(InputError, match="not valid TOML") as toml:
        read_toml(path, InputError)
    assert toml.value.where == str(path)
    path.write_text("a = 1")
    assert read_toml(path) == {"a": 1}


def test_a_file_is_written_aside_on_the_same_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Across two file systems it could not be renamed."""
    moves = []
    replace = os.replace
    monkeypatch.setattr("os.replace", lambda one, other: (moves.append((one, other)), replace(one, other)))
    path = tmp_path / "text"
    write_text(path, "x")
    [(aside, place)] = moves
    assert (Path(aside).parent, place) == (tmp_path, path)
    with staged_dir(tmp_path / "not" / "yet" / "made") as stage:
        assert stage.parent == tmp_path / "not" / "yet"


def test_only_a_likely_name_is_suggested() -> None:
    assert nearest("sampels", ["samples", "simple", "seed"]) == "; did you mean 'samples'?"
    assert nearest("xyzzy", ["samples", "seed"]) == ""


def test_the_cache_lies_where_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for said, wanted in (("/elsewhere", Path("/elsewhere")), ("", tmp_path / ".cache")):
        monkeypatch.setenv("XDG_CACHE_HOME", said)
        assert cache_home() == wanted


def test_what_is_written_is_for_all_to_read_and_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "text"
    write_text(path, "before")
    with staged_dir(tmp_path / "made"):
        pass
    assert (path.stat().st_mode & 0o777, (tmp_path / "made").stat().st_mode & 0o777) == (0o644, 0o755)
    with pytest.raises(OutputError, match="cannot be written"), little_room(100):
        write_text(path, "x" * 1000)
    assert path.read_text() == "before"
    with pytest.raises(ValueError, match="on the way"), staged_dir(tmp_path / "never") as stage:
        fail_after_writing(stage / "part")
    assert sorted(place.name for place in tmp_path.rglob("*")) == ["deep", "made", "text"]


def fail_after_writing(path: Path) -> None:
    path.touch()
    raise ValueError("on the way")


def test_lines_without_content_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\n{"a": 1}\r\n  \n\r\n{"a": 2}')
    assert read_jsonl(path) == [(2, {"a": 1}), (5, {"a": 2})]
    path.write_text("1\n[]\n{}\nnull\n")
    with pytest.raises(InputError, match="3 malformed") as caught:
        read_jsonl(path)
    assert [offender.split(": ")[0] for offender in caught.value.offenders] == [f"{path}:{line}" for line in (1, 2, 4)]


@contextlib.contextmanager
def little_room(size: int) -> Iterator[None]:
    """A disk on which a file can have ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_rows_are_appended_all_or_none(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, [{"a": 1}])
    with pytest.raises(OutputError, match="cannot be written"), little_room(path.stat().st_size + 100):
        append_jsonl(path, [{"b": "x" * 20}, {"c": "y" * 200}])
    append_jsonl(path, [{"d": 2}, {"e": 3}])
    assert [row for _, row in read_jsonl(path)] == [{"a": 1}, {"d": 2}, {"e": 3}]
