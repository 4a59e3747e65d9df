"""What `curation.yaml` may say: which answers the data set keeps, and which go to a person. Pure; read by
adapters/curation_file.py, carried out by core/selection.py.

    dataset:                          # what is kept for training; these are the defaults
      finish_reasons: [stop, tool_calls, function_call, completed]
      min_output_tokens: 1
      duplicates: {of: prompt}
    review:                           # what a person looks at
      rules: [{rule: random, n: 100}]
      cap: 200

Every key is checked and an unknown one refused, with its place in the file.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vllm_batch_dagster.core.errors import ConfigurationError

FINISHED = ("stop", "tool_calls", "function_call", "completed")
PATTERNS = ("prompt_matches", "prompt_lacks", "answer_matches", "answer_lacks")
_MOST_RULES = 50
_STRATUM = re.compile(r"model|finish_reason|length|metadata\..+|\$(\.[^.\[\]]+|\[-?\d+\])+")

Most: TypeAlias = Annotated[int, Field(ge=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Duplicates(_Part):
    """Rows that say the same as an earlier one that was kept are left out. `similarity` 1: exactly the same; less: the
    share of their runs of three words that they have in common."""

    of: Literal["prompt", "answer", "both"] = "prompt"
    similarity: float = Field(default=1.0, ge=0.5, le=1.0)


class Filters(_Part):
    """Rows that break one are left out. `finish_reasons` None: any. Lengths of the answer, in tokens and characters;
    patterns are searched for, in the syntax of Rust's regex crate, which needs linear time whatever the pattern."""

    finish_reasons: tuple[str, ...] | None = None
    min_output_tokens: int = Field(default=0, ge=0)
    max_output_tokens: int | None = Field(default=None, ge=0)
    min_characters: int = Field(default=0, ge=0)
    max_characters: int | None = Field(default=None, ge=0)
    prompt_matches: str | None = None
    prompt_lacks: str | None = None
    answer_matches: str | None = None
    answer_lacks: str | None = None
    duplicates: Duplicates | None = None

    @field_validator(*PATTERNS)
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            _try_pattern(pattern)
        return pattern


class DatasetFilters(Filters):
    """The data set is for training: whole answers, each prompt once."""

    finish_reasons: tuple[str, ...] | None = FINISHED
    min_output_tokens: int = Field(default=1, ge=0)
    duplicates: Duplicates | None = Duplicates()


class _Rule(_Part):
    """`name` is shown to the reviewer, default: the kind. `n`: most rows, None: all. `seed` orders what has no order of
    its own; a row's place follows from its custom_id alone."""

    name: str = ""
    n: Most | None = None
    seed: int = 0

    @property
    def title(self) -> str:
        return self.name or str(getattr(self, "rule", ""))


class RandomRule(_Rule):
    """`n` rows, or a `share` of them."""

    rule: Literal["random"]
    share: float | None = Field(default=None, gt=0, le=1)

    @model_validator(mode="after")
    def _says_how_many(self) -> "RandomRule":
        if self.n is None and self.share is None:
            raise ValueError("say how many: n or share")
        return self


class StratifiedRule(_Rule):
    """`each` rows of every value of `by`: model, finish_reason, length (bucket of output tokens, whose upper ends are
    `buckets`), metadata.KEY (of the request, else of the batch), or a path in the request: $.messages[0].role."""

    rule: Literal["stratified"]
    by: str
    each: Most
    buckets: tuple[int, ...] = (32, 128, 512, 2048)

    @field_validator("by")
    @classmethod
    def _is_known(cls, by: str) -> str:
        if not _STRATUM.fullmatch(by):
            raise ValueError("say model, finish_reason, length, metadata.KEY or a path such as $.messages[0].role")
        return by


class LowLogprobRule(_Rule):
    """The answers whose tokens' mean log probability is lowest, and below `below`. Only where the request asked for
    log probabilities."""

    rule: Literal["low_logprob"]
    below: float = Field(default=0.0, le=0)


class TruncatedRule(_Rule):
    """Answers that ended at their token budget."""

    rule: Literal["truncated"]


class LongRule(_Rule):
    """The longest answers of more than `above` tokens."""

    rule: Literal["long"]
    above: int = Field(ge=0)


class SchemaRule(_Rule):
    """Answers that are not the JSON for which their request asked."""

    rule: Literal["schema_failure"]


class DisagreementRule(_Rule):
    """Requests with n > 1 whose answers differ most: share of distinct ones, at least `least`."""

    rule: Literal["disagreement"]
    least: float = Field(default=0.5, gt=0, le=1)


Rule = Annotated[
    RandomRule | StratifiedRule | LowLogprobRule | TruncatedRule | LongRule | SchemaRule | DisagreementRule,
    Field(discriminator="rule"),
]

_DEFAULT_RULES: tuple[Any, ...] = (
    SchemaRule(rule="schema_failure", n=25),
    DisagreementRule(rule="disagreement", n=25),
    LowLogprobRule(rule="low_logprob", below=-1.0, n=25),
    TruncatedRule(rule="truncated", n=25),
    RandomRule(rule="random", n=100),
)


class Review(_Part):
    """Which rows go to a person. Where more than `cap` are chosen, earlier rules win. `cap` 0: none."""

    filters: Filters = Filters(duplicates=Duplicates(of="both"))
    rules: tuple[Rule, ...] = Field(default=_DEFAULT_RULES, max_length=_MOST_RULES)
    cap: int = Field(default=200, ge=0, le=100_000)


class CurationRules(_Part):
    """The whole file."""

    dataset: DatasetFilters = DatasetFilters()
    review: Review = Review()


def parse_rules(content: object) -> CurationRules:
    """Return the rules of a parsed file; None (an empty file) means the defaults. Raises ConfigurationError."""
    try:
        return CurationRules.model_validate({} if content is None else content)
    except ValidationError as error:
        raise ConfigurationError("; ".join(_explain(each) for each in error.errors()[:5])) from None


def _explain(error: Any) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{_place(error['loc'], error)}: {message}"


def _place(parts: Sequence[str | int], error: Mapping[str, Any]) -> str:
    """Return a place as people write it; pydantic puts the kind of a rule behind its number."""
    shown = ""
    for before, part in zip((None, *parts), parts, strict=False):
        if isinstance(part, int):
            shown += f"[{part}]"
        elif not isinstance(before, int):
            shown += f".{part}" if shown else str(part)
        elif part not in _KINDS:
            shown += f".{part}"
    return shown or "the file"


_KINDS = ("random", "stratified", "low_logprob", "truncated", "long", "schema_failure", "disagreement")


def _try_pattern(pattern: str) -> None:
    """Raises ValueError for a pattern that polars cannot use. Imported here: few who read settings need polars."""
    import polars

    try:
        polars.select(polars.lit("").str.contains(pattern))
    except polars.exceptions.ComputeError as error:
        raise ValueError(f"no regular expression: {' '.join(str(error).split())[:200]}") from None
