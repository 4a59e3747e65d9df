"""Carries the rules of the curation out as polars expressions: which filter a row breaks, which rules choose it. Pure.

Works on the columns of core/candidates.py, lazily; what is collected are line numbers and scores, never texts.
"""

from collections.abc import Sequence
from typing import Any

import polars

from vllm_batch_dagster.core.candidates import draw_column, stratum_column
from vllm_batch_dagster.core.curation_rules import (
    DisagreementRule,
    Filters,
    LongRule,
    LowLogprobRule,
    RandomRule,
    Review,
    Rule,
    SchemaRule,
    StratifiedRule,
    TruncatedRule,
)

REFUSED = "refused"
PICKS: Any = {"line": polars.Int64, "rule": polars.Int32, "score": polars.Float64, "order": polars.UInt32}
SELECTION: Any = {"line": polars.Int64, "rules": polars.List(polars.String), "score": polars.Float64}
_col = polars.col


def refusal(filters: Filters) -> polars.Expr:
    """Return the name of the first filter that a row breaks, null for a row that passes."""
    broken = [polars.when(condition).then(polars.lit(name)) for name, condition in _conditions(filters)]
    return polars.coalesce(broken).alias(REFUSED)


def _conditions(filters: Filters) -> Sequence[tuple[str, polars.Expr]]:
    answer, prompt, tokens = _col("answer"), _col("prompt"), _col("output_tokens")
    found = [("no_text", answer.str.strip_chars() == "")]
    if filters.finish_reasons is not None:
        found.append(("not_finished", ~_col("finish_reason").is_in(list(filters.finish_reasons))))
    lengths = answer.str.len_chars()
    for name, limit, condition in (
        ("too_short", filters.min_output_tokens or None, tokens < (filters.min_output_tokens or 0)),
        ("too_long", filters.max_output_tokens, tokens > (filters.max_output_tokens or 0)),
        ("few_characters", filters.min_characters or None, lengths < filters.min_characters),
        ("many_characters", filters.max_characters, lengths > (filters.max_characters or 0)),
        ("prompt_matches", filters.prompt_matches, ~prompt.str.contains(filters.prompt_matches or "")),
        ("prompt_lacks", filters.prompt_lacks, prompt.str.contains(filters.prompt_lacks or "")),
        ("answer_matches", filters.answer_matches, ~answer.str.contains(filters.answer_matches or "")),
        ("answer_lacks", filters.answer_lacks, answer.str.contains(filters.answer_lacks or "")),
    ):
        if limit is not None:
            found.append((name, condition))
    return found


def choose(rows: polars.LazyFrame, review: Review) -> polars.DataFrame:
    """Return line, names of the rules (the first one in the file first) and its score of the chosen `rows`, by line.

    `rows` are those that pass the filters. Earlier rules win where there are more than `cap`.
    """
    picks = [_pick(rows, rule, at) for at, rule in enumerate(review.rules)]
    if not picks or not review.cap:
        return polars.DataFrame(schema=SELECTION)
    titles = polars.Series([rule.title for rule in review.rules])
    together = polars.concat(picks).collect(engine="streaming").sort("rule", "order", "line")
    chosen = (
        together.group_by("line", maintain_order=True)
        .agg(_col("rule"), _col("score").first())
        .head(review.cap)
        .with_columns(rules=_col("rule").list.eval(polars.element().replace_strict(dict(enumerate(titles)))))
    )
    return chosen.select(*SELECTION).cast(SELECTION).sort("line")


def _pick(rows: polars.LazyFrame, rule: Rule, at: int) -> polars.LazyFrame:
    """Return what one rule chooses, with its rank as `order`."""
    drawn = _col(draw_column(rule.seed))
    chosen = _choose_by(rows, rule, drawn, _col(stratum_column(at)))
    chosen = chosen.head(rule.n) if rule.n is not None else chosen
    return chosen.with_row_index("order").select("line", polars.lit(at).alias("rule"), "score", "order").cast(PICKS)


def _choose_by(rows: polars.LazyFrame, rule: Rule, drawn: polars.Expr, stratum: polars.Expr) -> polars.LazyFrame:
    """Return line and score of every row that the rule means, best first."""
    none = polars.lit(None, polars.Float64).alias("score")
    match rule:
        case RandomRule(share=share):
            within = drawn < int(share * (1 << 63)) if share is not None and share < 1 else polars.lit(True)
            return rows.filter(within).sort(drawn).select("line", none)
        case StratifiedRule(each=each):
            place = drawn.rank("ordinal").over(stratum)
            return rows.filter(place <= each).sort(stratum, drawn).select("line", none)
        case LowLogprobRule(below=below):
            low = _col("mean_logprob")
            return rows.filter(low < below).sort(low, drawn).select("line", low.alias("score"))
        case LongRule(above=above):
            tokens = _col("output_tokens")
            return rows.filter(tokens > above).sort(-tokens, drawn).select("line", tokens.alias("score"))
        case DisagreementRule(least=least):
            share_ = _col("disagreement")
            return rows.filter(share_ >= least).sort(-share_, drawn).select("line", share_.alias("score"))
        case TruncatedRule() | SchemaRule():
            flag = _col("is_cut" if isinstance(rule, TruncatedRule) else "breaks_schema")
            return rows.filter(flag).sort(drawn).select("line", none)
