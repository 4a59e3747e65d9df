"""Makes texts and JSON fit for PostgreSQL, for the handler `postgres`. Pure.

PostgreSQL stores no U+0000, neither in text nor in JSONB; JSON allows it. It becomes U+FFFD, the replacement character,
and the row says so (`is_altered`). The output file keeps what the engine wrote.
"""

import re

REPLACEMENT = "\ufffd"
_NUL = rb"\u0000"
# One escape at a time, so that the second backslash of `\\u0000` (a backslash, then text) is not taken for a start.
_ESCAPE = re.compile(rb"\\(?:u0000|.)")


def fit_text(text: str | None) -> str | None:
    """Return `text` as a text column can hold it."""
    return text.replace("\x00", REPLACEMENT) if text is not None and "\x00" in text else text


def fit_json(value: bytes | None) -> str | None:
    """Return the JSON `value` as a JSONB column can hold it."""
    if value is None:
        return None
    if _NUL in value:
        value = _ESCAPE.sub(lambda found: rb"\ufffd" if found[0] == _NUL else found[0], value)
    return value.decode("utf-8", "replace")
