"""Files in and out: JSON, JSONL, TOML, digests."""

from __future__ import annotations

import codecs
import contextlib
import difflib
import hashlib
import json
import os
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from trtkit.errors import ConfigError, InputError, OutputError, TrtkitError

__all__ = [
    "JsonObject",
    "append_jsonl",
    "cache_home",
    "check_lasting",
    "digest_file",
    "each_jsonl",
    "nearest",
    "read_json",
    "read_jsonl",
    "read_text",
    "read_toml",
    "refuse_malformed",
    "sampled_jsonl",
    "write_json",
    "write_text",
    "write_toml",
    "writing",
]

JsonObject: TypeAlias = dict[str, Any]

_SAVE = "save the text in a file and name that"
_SHOWN = 5
_LONGEST_LINE = 1 << 26


def check_lasting(path: Path) -> None:
    """Refuse a pipe, which is empty the second time: :class:`InputError`. What does not exist is not looked at."""
    if str(path) == "-" and not path.exists():
        raise InputError("the standard input is not read", where="-", hint=_SAVE)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise InputError("a pipe or a device, and this file is read more than once", where=str(path), hint=_SAVE)


def read_text(path: Path, error: type[TrtkitError] = ConfigError) -> str:
    """The file's text. Raises ``error`` when it is missing, unreadable or not UTF-8 (with the byte's line)."""
    try:
        raw = path.read_bytes()
    except OSError as problem:
        _raise_unreadable(path, problem, error)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raw = problem.object  # its places count from behind a byte order mark
        line = raw[: problem.start].count(b"\n") + 1
        _raise_no_utf8(problem, f"{path}:{line}", error)


def _raise_unreadable(path: Path, problem: OSError, error: type[TrtkitError]) -> NoReturn:
    if isinstance(problem, FileNotFoundError):
        raise error("no such file", where=str(path), hint=_what_is_there(path)) from None
    raise error(f"cannot be read: {problem.strerror or problem}", where=str(path)) from None


def _raise_no_utf8(problem: UnicodeDecodeError, where: str, error: type[TrtkitError]) -> NoReturn:
    raise error(
        f"not UTF-8 text (byte 0x{problem.object[problem.start]:02x})",
        where=where,
        hint="convert the file to UTF-8, for example with iconv",
    ) from None


def _what_is_there(path: Path) -> str | None:
    """A hint about a file that is not there."""
    folder, suffix = path.parent, path.suffix.lower()
    if not folder.is_dir():
        return f"there is no directory {folder}"
    try:
        names = sorted(other.name for other in folder.iterdir() if other.is_file())
    except OSError:
        return None
    if close := difflib.get_close_matches(path.name, names, n=1, cutoff=0.8):
        return f"did you mean {folder / close[0]}?"
    alike = [name for name in names if name.lower().endswith(suffix)] if suffix in (".jsonl", ".csv") else []
    if alike:
        return f"in {folder.resolve()} there are: {', '.join(alike[:_SHOWN])}{', ...' if len(alike) > _SHOWN else ''}"
    return None if path.is_absolute() else f"it was looked for from {Path.cwd()}"


def read_json(path: Path, error: type[TrtkitError] = ConfigError) -> JsonObject:
    """The JSON object in ``path``; ``error`` with file:line for anything else."""
    text = read_text(path, error)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as problem:
        raise error(f"not valid JSON: {problem.msg}", where=f"{path}:{problem.lineno}") from None
    except (ValueError, RecursionError) as problem:  # a number of thousands of digits, or nested thousands deep
        raise error(f"not valid JSON: {problem}", where=str(path)) from None
    if not isinstance(value, dict):
        raise error("expected a JSON object at the top level", where=str(path))
    return value


def read_jsonl(path: Path, error: type[TrtkitError] = InputError) -> list[tuple[int, JsonObject]]:
    """All rows of a JSON-lines file as ``(line number, object)``; blank lines are skipped.

    Raises ``error`` with every malformed line listed, not only the first one.
    """
    offenders: list[str] = []
    rows = list(each_jsonl(path, offenders, error))
    refuse_malformed(path, offenders, error)
    return rows


def each_jsonl(
    path: Path, offenders: list[str], error: type[TrtkitError] = InputError
) -> Iterator[tuple[int, JsonObject]]:
    """The rows of :func:`read_jsonl`, each when it is asked for; what is wrong with a line goes to ``offenders``."""
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                raw = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if (row := _row(raw, f"{path}:{number}", offenders, error)) is not None:
                    yield number, row
    except OSError as problem:
        _raise_unreadable(path, problem, error)


def sampled_jsonl(path: Path, count: int, offenders: list[str]) -> list[tuple[str, JsonObject]]:
    """About ``count`` rows from places that are spread evenly over the file, and where each begins.

    For files too large to go through: no line but these is read. Raises :class:`InputError`.
    """
    found: dict[int, JsonObject] = {}
    try:
        with path.open("rb") as stream:
            size = path.stat().st_size
            for number in range(count):
                if place := size * number // count:
                    stream.seek(place - 1)
                    stream.readline(_LONGEST_LINE)  # the rest of the line before
                begin, line = stream.tell(), stream.readline(_LONGEST_LINE)
                if len(line) == _LONGEST_LINE:
                    raise InputError(
                        f"a line of more than {_LONGEST_LINE >> 20} MiB", where=f"{path}: byte {begin}",
                        hint="every line must be one JSON object",
                    )  # fmt: skip
                if begin in found:
                    continue
                raw = line if begin else line.removeprefix(codecs.BOM_UTF8)
                if (row := _row(raw, f"{path}: byte {begin}", offenders, InputError)) is not None:
                    found[begin] = row
    except OSError as problem:
        _raise_unreadable(path, problem, InputError)
    return [(f"{path}: byte {begin}", row) for begin, row in found.items()]


def _row(line: bytes, where: str, offenders: list[str], error: type[TrtkitError]) -> JsonObject | None:
    """The object in a line; None for a blank one, and for a malformed one, which goes to ``offenders``."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as problem:
        _raise_no_utf8(problem, where, error)
    if not text.strip():
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as problem:
        offenders.append(f"{where}: not valid JSON: {getattr(problem, 'msg', problem)}")
        return None
    if not isinstance(value, dict):
        offenders.append(f"{where}: expected a JSON object, found {type(value).__name__}")
        return None
    return value


def refuse_malformed(path: Path, offenders: list[str], error: type[TrtkitError] = InputError) -> None:
    """Raise ``error`` when :func:`each_jsonl` or :func:`sampled_jsonl` has found malformed lines."""
    if offenders:
        raise error(
            f"{len(offenders)} malformed line(s)",
            where=str(path),
            offenders=offenders[:20],
            hint='every line must be one JSON object, e.g. {"id": "1", "problem": "..."}',
        )


def read_toml(path: Path, error: type[TrtkitError] = ConfigError) -> JsonObject:
    """The TOML document in ``path``."""
    try:
        return tomllib.loads(read_text(path, error))
    except tomllib.TOMLDecodeError as problem:
        raise error(f"not valid TOML: {problem}", where=str(path)) from None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """An ``OSError`` inside the block becomes an :class:`OutputError` about ``path``."""
    try:
        yield
    except OSError as problem:
        _unwritable(path, problem)


def _unwritable(path: Path, problem: OSError) -> NoReturn:
    raise OutputError(
        f"cannot be written: {problem.strerror or problem}",
        where=str(path),
        hint="check free space and permissions, or choose another place with --out",
    ) from None


def write_text(path: Path, text: str) -> None:
    """Write ``text`` aside and rename it into place. Raises :class:`OutputError`."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, indented, with a final newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_toml(path: Path, value: Mapping[str, Any]) -> None:
    """Write a TOML document."""
    import tomli_w  # here: running an engine writes none

    write_text(path, tomli_w.dumps(dict(value)))


def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows and sync them to the disk: what was appended survives ``kill -9``.

    All of them or, with :class:`OutputError`, none: part of a row would spoil the next one.
    """
    left = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    with writing(path), path.open("ab", buffering=0) as stream:
        size = stream.tell()
        try:
            while left:
                left = left[stream.write(left) :]
            os.fsync(stream.fileno())
        except BaseException:
            with contextlib.suppress(OSError):
                stream.truncate(size)
            raise


def cache_home() -> Path:
    """``$XDG_CACHE_HOME``, or ``~/.cache``; for a user without a home (a container's bare number) the temporary files'
    place. Whether anything may be read or written there is another question."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return Path(tempfile.gettempdir())


def digest_file(path: Path) -> str:
    """SHA-256 of the file's bytes, as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def nearest(name: str, valid: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` when ``name`` looks like a typing error of a valid name, else an empty string."""
    close = difflib.get_close_matches(name, list(valid), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
