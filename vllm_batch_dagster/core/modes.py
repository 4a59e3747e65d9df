"""How an input file is judged: exactly as OpenAI does, or leniently. Asked by validation before the first line.

strict   one bad line fails the batch; every url is the batch's endpoint; one model per file
lenient  bad lines go to the error file and the others run; a line runs on its own url; several models are grouped
"""

from collections.abc import Mapping
from enum import StrEnum

METADATA_KEY = "validation"


class ValidationMode(StrEnum):
    """The value is what a batch's metadata and VALIDATION_MODE say."""

    STRICT = "strict"
    LENIENT = "lenient"


def choose_mode(metadata: Mapping[str, str] | None, default: ValidationMode) -> ValidationMode:
    """Return the mode of a batch: what its metadata asks for, else `default`.

    Any other value of the key is the user's own and means nothing here: OpenAI gives metadata no meaning.
    """
    asked = (metadata or {}).get(METADATA_KEY)
    return ValidationMode(asked) if asked in tuple(ValidationMode) else default
