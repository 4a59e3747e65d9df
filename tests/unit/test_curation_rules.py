"""What `curation.yaml` may say, and how a mistake in it is named."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from vllm_batch_dagster.adapters.curation_file import load_rules
from vllm_batch_dagster.core.curation_rules import CurationRules, RandomRule, parse_rules
from vllm_batch_dagster.core.errors import ConfigurationError
from vllm_batch_dagster.settings import PROJECT_ROOT


def test_without_a_file_the_defaults_hold() -> None:
    loaded = load_rules(None)
    assert loaded.rules == CurationRules() == parse_rules(None) == parse_rules({})
    assert loaded.path is None
    assert [rule.title for rule in loaded.rules.review.rules] == [
        "schema_failure",
        "disagreement",
        "low_logprob",
        "truncated",
        "random",
    ]


def test_the_page_of_the_documentation_shows_the_defaults() -> None:
    page = (PROJECT_ROOT / "docs" / "curation.md").read_text()
    shown = page.split("```yaml\n")[1].split("```")[0]
    assert parse_rules(yaml.safe_load(shown)) == CurationRules()


def test_the_digest_is_that_of_the_meaning(tmp_path: Path) -> None:
    one, other, third = (tmp_path / f"{number}.yaml" for number in range(3))
    one.write_text("review: {rules: [{rule: random, n: 5}]}")
    other.write_text("# the same\nreview:\n  rules:\n    - n: 5\n      rule: random\n")
    third.write_text("review: {rules: [{rule: random, n: 6}]}")
    assert load_rules(one).digest == load_rules(other).digest
    assert len({load_rules(path).digest for path in (None, one, third)}) == 3
    assert load_rules(one).rules.review.rules == (RandomRule(rule="random", n=5),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"reveiw": {}}, "reveiw: Extra inputs"),
        ({"review": {"rules": [{"rule": "random"}]}}, "review.rules[0]: say how many: n or share"),
        ({"review": {"rules": [{"rule": "random", "n": 0}]}}, "review.rules[0].n: Input should be greater"),
        ({"review": {"rules": [{"rule": "random", "share": 2}]}}, "review.rules[0].share: "),
        ({"review": {"rules": [{"rule": "rnadom", "n": 1}]}}, "review.rules[0]: Input tag 'rnadom'"),
        ({"review": {"rules": [{"n": 1}]}}, "review.rules[0]: Unable to extract tag"),
        ({"review": {"rules": {"rule": "random"}}}, "review.rules: "),
        ({"review": {"rules": [{"rule": "stratified", "by": "colour", "each": 1}]}}, "review.rules[0].by: say model"),
        ({"review": {"rules": [{"rule": "stratified", "by": "$", "each": 1}]}}, "review.rules[0].by: say model"),
        ({"review": {"filters": {"answer_matches": "("}}}, "review.filters.answer_matches: no regular expression"),
        ({"dataset": {"duplicates": {"similarity": 0.1}}}, "dataset.duplicates.similarity: "),
        ({"dataset": {"min_output_tokens": "many"}}, "dataset.min_output_tokens: "),
        ([], "the file: "),
        ("rules", "the file: "),
    ],
)
def test_a_mistake_is_named_with_its_place(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "curation.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigurationError) as error:
        load_rules(path)
    assert str(error.value).startswith(f"CURATION_FILE {path}: {message}")


def test_a_file_that_is_missing_or_no_yaml(tmp_path: Path) -> None:
    path = tmp_path / "curation.yaml"
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_rules(path)
    path.write_text("review: [")
    with pytest.raises(ConfigurationError, match="is no YAML"):
        load_rules(path)
