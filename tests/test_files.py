"""Reading what others wrote, and directories that appear whole or not at all."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from trtkit.errors import ConfigError, InputError, OutputError
from trtkit.files import append_jsonl, read_json, read_jsonl, staged_dir


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


@pytest.mark.parametrize("before", ["nothing", "empty", "full"])
def test_a_link_stays_and_what_it_points_to_is_written(tmp_path: Path, before: str) -> None:
    disk, link = tmp_path / "disk", tmp_path / "link"
    link.symlink_to(disk)
    if before != "nothing":
        disk.mkdir()
    if before == "full":
        (disk / "old").touch()
        with pytest.raises(OutputError, match="already exists"), staged_dir(link):
            pass
    with staged_dir(link, replace=before == "full") as stage:
        (stage / "new").touch()
    assert link.is_symlink()
    assert [path.name for path in disk.iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


@pytest.mark.parametrize("replace", [False, True])
def test_a_file_is_no_place_for_a_directory_and_that_is_said_before_the_work(tmp_path: Path, replace: bool) -> None:
    target = tmp_path / "target"
    target.write_text("mine")
    worked = False
    with pytest.raises(OutputError, match="is a file"), staged_dir(target, replace=replace):
        worked = True
    assert not worked
    assert target.read_text() == "mine"


def test_rows_are_appended_all_or_none(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, [{"a": 1}])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, hard))  # a disk with 100 bytes left
    try:
        with pytest.raises(OutputError, match="cannot be written"):
            append_jsonl(path, [{"b": "x" * 20}, {"c": "y" * 200}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    append_jsonl(path, [{"d": 2}, {"e": 3}])
    assert [row for _, row in read_jsonl(path)] == [{"a": 1}, {"d": 2}, {"e": 3}]
