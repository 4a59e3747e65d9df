"""Checks an answer against the JSON schema of its request. Used by repair rounds only.

The schemas are the users': they are compiled once, a bounded number is kept, a `$ref` into the network is not followed,
and a pattern may take so many steps and no more.
"""

from collections import OrderedDict
from typing import Any

import jsonschema_rs
import msgspec

from vllm_batch_dagster.core.repair import Format

_KEPT = 64
_PATTERNS = jsonschema_rs.FancyRegexOptions(backtrack_limit=100_000, size_limit=1 << 20, dfa_size_limit=1 << 20)


class SchemaChecker:
    """Compiled schemas, the last 64 that were used."""

    def __init__(self) -> None:
        self._compiled: OrderedDict[bytes, Any] = OrderedDict()

    def fits(self, text: str, wanted: Format) -> bool:
        """True when `text` is the JSON that was asked for; also when nobody can tell, because the schema is none."""
        try:
            value = msgspec.json.decode(text)
        except (msgspec.DecodeError, RecursionError):
            return False
        if wanted.schema is None:
            return isinstance(value, dict)
        validator = self._validator(wanted.schema)
        try:
            return validator is None or bool(validator.is_valid(value))
        except ValueError:
            return True  # a pattern that takes too many steps

    def _validator(self, schema: bytes) -> Any:
        if schema in self._compiled:
            self._compiled.move_to_end(schema)
            return self._compiled[schema]
        while len(self._compiled) >= _KEPT:
            self._compiled.popitem(last=False)
        self._compiled[schema] = _compile(schema)
        return self._compiled[schema]


def _compile(schema: bytes) -> Any:
    try:
        return jsonschema_rs.validator_for(msgspec.json.decode(schema), pattern_options=_PATTERNS, offline=True)
    except (ValueError, msgspec.DecodeError, jsonschema_rs.ReferencingError):
        return None
