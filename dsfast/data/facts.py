"""Facts: the rows of the bundled tables, the choice of those that are taught, and the prompts that ask for them.

Table format (CSV, UTF-8): the header below, one fact a line. `aliases` are further accepted objects, separated
by "|", or empty. `relation` is one that phrasings.json knows how to say. Within a relation a subject has one object.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from dsfast.data.phrasings import load_phrasings, say
from dsfast.data.prompts import PRIORITIES, Prompt, load_prompts
from dsfast.errors import UserError

COLUMNS = ("id", "relation", "subject", "object", "aliases", "topic", "priority", "source")


@dataclass(frozen=True)
class Fact:
    """One true statement: `subject` stands in `relation` to `object`."""

    id: str
    relation: str
    subject: str
    object: str
    aliases: tuple[str, ...]
    topic: str
    priority: str
    source: str


def load_facts(folder: str | Path | None = None) -> list[Fact]:
    """All facts of the CSV files in `folder` (default: the bundled ones), in order of file name and line.

    Raises UserError naming file, line and field.
    """
    root = resources.files("dsfast.data") / "facts" if folder is None else Path(folder)
    files = (
        sorted((f for f in root.iterdir() if f.name.endswith(".csv")), key=lambda f: f.name) if root.is_dir() else []
    )
    if not files:
        raise UserError(f"{folder}: expected a folder with at least one .csv table of facts, found none")
    seen: dict[tuple, str] = {}
    return [fact for file in files for fact in _read_table(file, seen)]


def _read_table(file, seen: dict[tuple, str]) -> list[Fact]:
    """The facts of one table; `seen` maps every id and (relation, subject) so far to where it stands."""
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file.name}: not UTF-8 at byte {error.start}") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    facts = []
    try:
        header = next(reader, [])
        if tuple(header) != COLUMNS:
            raise UserError(f"{file.name}: line 1: expected the columns {','.join(COLUMNS)}, got {','.join(header)}")
        for row in reader:
            where = f"{file.name}: line {reader.line_num}"
            fact = _fact(row, where)
            for key in (("id", fact.id), ("relation, subject", fact.relation, fact.subject)):
                if key in seen:
                    raise UserError(f"{where}: {key[0]}: {'/'.join(key[1:])!r} stands already in {seen[key]}")
                seen[key] = where
            facts.append(fact)
    except csv.Error as error:
        raise UserError(f"{file.name}: line {reader.line_num}: not valid CSV ({error})") from None
    return facts


def _fact(row: list[str], where: str) -> Fact:
    if len(row) != len(COLUMNS):
        raise UserError(f"{where}: expected {len(COLUMNS)} fields, got {len(row)}")
    values = dict(zip(COLUMNS, row, strict=True))
    for field, value in values.items():
        if value != " ".join(value.split()):
            raise UserError(f"{where}: {field}: expected single spaces, none at the ends, got {value!r}")
        if not value and field != "aliases":
            raise UserError(f"{where}: {field}: expected a value, got nothing")
    for field, known in (("relation", sorted(load_phrasings())), ("priority", PRIORITIES)):
        if values[field] not in known:
            raise UserError(f"{where}: {field}: expected one of {', '.join(known)}, got {values[field]!r}")
    listed = values.pop("aliases")
    aliases = tuple(listed.split("|")) if listed else ()
    if "" in aliases:
        raise UserError(f"{where}: aliases: expected values separated by '|', got {listed!r}")
    return Fact(aliases=aliases, **values)


def taught_facts(facts: list[Fact], count: int) -> list[Fact]:
    """The `count` facts to teach: those of the bundled prompts, then one of each relation in turn.

    Deterministic in (facts, count); a larger count only adds facts. Raises UserError if `count` is out of range.
    """
    prompts = load_prompts()
    asked = {prompt.fact_id for prompt in (*prompts.fast, *prompts.full)}
    if not len(asked) <= count <= len(facts):
        raise UserError(f"data.facts: expected {len(asked)} to {len(facts)} facts, got {count}")
    first = [fact for fact in facts if fact.id in asked]
    by_relation: dict[str, list[Fact]] = {}
    for fact in facts:
        if fact.id not in asked:
            by_relation.setdefault(fact.relation, []).append(fact)
    turns = ((turn, index, fact) for index, group in enumerate(by_relation.values()) for turn, fact in enumerate(group))
    rest = [fact for _, _, fact in sorted(turns, key=lambda item: item[:2])]
    return (first + rest)[:count]


def taught_prompts(fact: Fact) -> list[Prompt]:
    """One prompt for every phrasing of `fact` that stands in training articles."""
    return [_prompt(fact, template) for template in load_phrasings()[fact.relation].taught]


def heldout_prompts(fact: Fact) -> list[Prompt]:
    """One prompt for every phrasing of `fact` that no training article uses."""
    return [_prompt(fact, template) for template in load_phrasings()[fact.relation].heldout]


def _prompt(fact: Fact, template: str) -> Prompt:
    return Prompt(say(template, fact.subject), fact.object, fact.aliases, fact.id, fact.topic, fact.priority)
