"""Where text comes from: the user's own files, read, cleaned and freed of repeats.

- a .txt file: documents are separated by blank lines;
- a .jsonl file: one JSON object a line with "text"; other fields, such as a title, are left alone;
- a folder: every .txt file in it is one document, in order of file name.
"""

from __future__ import annotations

import json
import re
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from dsfast.errors import UserError

ENCYCLOPEDIA = "encyclopedia"


def read_texts(source: str, max_texts: int) -> list[str]:
    """The first `max_texts` distinct, non-empty documents of a user's `source`, with a warning where there are more.

    Raises UserError for a source of no known kind, what cannot be read or is a broken link, text that is not UTF-8 (file and
    byte), a broken line of JSON (file and line) and a source without any text.
    """
    path = Path(source)
    try:
        texts = list(islice(without_repeats(map(sanitize, _documents(path))), max_texts + 1))
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot read ({error.strerror})") from None
    if not texts:
        raise UserError(f"{path}: expected text, found none")
    if len(texts) > max_texts:
        warnings.warn(f"{path}: only its first {max_texts:,} documents are read (data.max_articles)", stacklevel=2)
    return texts[:max_texts]


def sanitize(text: str) -> str:
    """NFC form, without control characters, each run of white space one space."""
    text = "".join(c for c in text if c.isspace() or unicodedata.category(c) != "Cc")
    return re.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).strip()


def without_repeats(texts: Iterable[str]) -> Iterator[str]:
    """The texts that are neither empty nor the same as an earlier one."""
    seen = {""}
    for text in texts:
        if text not in seen:
            seen.add(text)
            yield text


def _documents(path: Path) -> Iterator[str]:
    """Texts as they stand in the source."""
    if path.is_dir():
        yield from map(_read_text, _files(path))
    elif path.suffix == ".txt" and path.is_file():
        yield from re.split(r"\n\s*\n", _read_text(path))
    elif path.suffix == ".jsonl" and path.is_file():
        yield from _read_jsonl(path)
    else:
        raise UserError(
            f"data.source: expected '{ENCYCLOPEDIA}', an existing .txt or .jsonl file, or a folder of .txt files (by its whole"
            f" name, or as seen from {Path.cwd()}), got '{path}'"
        )


def _files(folder: Path) -> Iterator[Path]:
    """The .txt files in it, in order of name. Raises UserError for a link to one that is not there."""
    for file in sorted(file for file in folder.iterdir() if file.match("*.txt")):
        if file.is_symlink() and not file.exists():
            raise UserError(f"{file}: expected a text file, this is a broken link")
        if file.is_file():
            yield file


def _read_text(path: Path) -> str:
    return _decode(path.read_bytes(), path, 0)


def _read_jsonl(path: Path) -> Iterator[str]:
    offset = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            line = _decode(raw, path, offset)
            offset += len(raw)
            if line.strip():
                yield _json_document(line, f"{path}:{number}")


def _json_document(line: str, where: str) -> str:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
        raise UserError(f'{where}: expected an object with a string "text"')
    try:
        entry["text"].encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where}: holds half of a surrogate pair, which no UTF-8 text can") from None
    return entry["text"]


def _decode(raw: bytes, path: Path, offset: int) -> str:
    """`raw`, which begins at byte `offset` of `path`, as text."""
    try:
        text = raw.decode("utf-8")
        return text.removeprefix("\ufeff") if offset == 0 else text
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {offset + error.start}") from None
