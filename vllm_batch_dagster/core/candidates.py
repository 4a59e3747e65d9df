"""An answered line as the rules of the curation see it: the row of the data set, and what the rules judge it by.

Called by stages/curation.py for every answered line. Everything that needs the whole request or answer is found out
here, so that the rules themselves (core/selection.py) work on columns.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import msgspec

from vllm_batch_dagster.core.curation import CuratedRow, make_row
from vllm_batch_dagster.core.curation_rules import CurationRules, StratifiedRule
from vllm_batch_dagster.core.repair import is_cut, said_texts

COLUMNS = tuple(field.name for field in fields(CuratedRow))
NO_VALUE = "none"
_STEP = re.compile(r"\.([^.\[\]]+)|\[(-?\d+)\]")
_EDGES = " \t\n.,;:!?\"'`*"


class _Token(msgspec.Struct):
    logprob: float | None = None


class _Logprobs(msgspec.Struct):
    content: list[_Token] | None = None
    token_logprobs: list[float | None] | None = None


class _Choice(msgspec.Struct):
    logprobs: _Logprobs | None = None


class _Part(msgspec.Struct):
    logprobs: list[_Token] | None = None


class _Item(msgspec.Struct):
    content: list[_Part] | None = None


class _Said(msgspec.Struct):
    choices: list[_Choice] | None = None
    output: list[_Item] | None = None


_said = msgspec.json.Decoder(_Said)


@dataclass(frozen=True, slots=True)
class Line:
    """One answered line: bodies as they came, `breaks_schema` from the check of its answer."""

    batch_id: str
    number: int
    custom_id: str
    request: bytes
    answer: bytes
    breaks_schema: bool = False


class CandidateMaker:
    """Builds rows for these rules. `metadata` is the batch's."""

    def __init__(self, rules: CurationRules, metadata: Mapping[str, str] | None) -> None:
        self._metadata = metadata or {}
        self._seeds = seeds_of(rules)
        self._strata = {
            stratum_column(at): rule for at, rule in enumerate(rules.review.rules) if isinstance(rule, StratifiedRule)
        }

    def make(self, line: Line) -> dict[str, Any]:
        """Return the columns of a row. Raises msgspec.DecodeError for JSON that Python cannot hold (1e999)."""
        row = make_row(line.batch_id, line.number, line.custom_id, line.request, line.answer)
        answers = said_texts(line.answer) or [row.answer]
        return {
            **asdict(row),
            "answers": answers,
            "is_cut": is_cut(line.answer),
            "breaks_schema": line.breaks_schema,
            "mean_logprob": mean_logprob(line.answer),
            "disagreement": disagreement(answers),
            **{draw_column(seed): draw(line.custom_id, seed) for seed in self._seeds},
            **self._find_strata(row, line.request),
        }

    def _find_strata(self, row: CuratedRow, request: bytes) -> dict[str, str]:
        if not self._strata:
            return {}
        asked = msgspec.json.decode(request)
        return {column: self._stratum(rule, row, asked) for column, rule in self._strata.items()}

    def _stratum(self, rule: StratifiedRule, row: CuratedRow, asked: Mapping[str, Any]) -> str:
        if rule.by == "length":
            return bucket(row.output_tokens, rule.buckets)
        if rule.by.startswith("metadata."):
            key = rule.by.removeprefix("metadata.")
            own = asked.get("metadata")
            return str((own if isinstance(own, dict) and key in own else self._metadata).get(key, NO_VALUE))
        if rule.by.startswith("$"):
            return follow_path(asked, rule.by)
        return str(getattr(row, rule.by)) or NO_VALUE


def schema(rules: CurationRules) -> Mapping[str, type]:
    """Return name and Python type of every column, for a table that has no row yet."""
    kinds: dict[str, type] = {field.name: field.type for field in fields(CuratedRow) if isinstance(field.type, type)}
    kinds |= {"answers": list, "is_cut": bool, "breaks_schema": bool, "mean_logprob": float, "disagreement": float}
    kinds |= {draw_column(seed): int for seed in seeds_of(rules)}
    stratified = (at for at, rule in enumerate(rules.review.rules) if isinstance(rule, StratifiedRule))
    return kinds | {stratum_column(at): str for at in stratified}


def seeds_of(rules: CurationRules) -> Sequence[int]:
    return sorted({rule.seed for rule in rules.review.rules})


def draw_column(seed: int) -> str:
    return f"draw_{seed}"


def stratum_column(rule: int) -> str:
    return f"stratum_{rule}"


def draw(custom_id: str, seed: int) -> int:
    """Return a number below 2^63 that follows from the id and the seed alone: rows with the smallest are the sample, so
    a rerun, another chunk size or an answer made anew selects the same lines."""
    digest = hashlib.blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=8, key=str(seed).encode())
    return int.from_bytes(digest.digest()) >> 1


def mean_logprob(answer: bytes) -> float | None:
    """Return the mean log probability of an answer's tokens (of the first choice), None where it has none."""
    try:
        said = _said.decode(answer)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    values = [value for value in _logprobs(said) if value is not None]
    return sum(values) / len(values) if values else None


def _logprobs(said: _Said) -> Sequence[float | None]:
    if said.choices:
        found = said.choices[0].logprobs or _Logprobs()
        return found.token_logprobs or [token.logprob for token in found.content or ()]
    parts = (part for item in said.output or () for part in item.content or ())
    return [token.logprob for part in parts for token in part.logprobs or ()]


def disagreement(answers: Sequence[str]) -> float | None:
    """Return the share of distinct answers, case, white space and outer punctuation aside; None for a single one."""
    if len(answers) < 2:
        return None
    return len({normalise(text) for text in answers}) / len(answers)


def normalise(text: str) -> str:
    return " ".join(text.casefold().split()).strip(_EDGES)


def bucket(tokens: int, ends: Sequence[int]) -> str:
    """Return the name of the bucket: `0-32`, `33-128`, `2049-`."""
    first = 0
    for end in sorted(ends):
        if tokens <= end:
            return f"{first}-{end}"
        first = end + 1
    return f"{first}-"


def follow_path(value: Any, path: str) -> str:
    """Return what stands at a path such as `$.messages[0].role`, as text; `none` when nothing does."""
    for name, number in _STEP.findall(path):
        try:
            value = value[int(number)] if number and isinstance(value, list) else value[name]
        except (KeyError, IndexError, TypeError):
            return NO_VALUE
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()
