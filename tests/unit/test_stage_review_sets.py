"""Training sets, gold sets and exports on disk: whole, versioned by their contents, every item counted."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars
import pytest

from tests.unit.conftest import Rig
from tests.unit.review_samples import annotation, task
from tests.unit.review_source import Project
from vllm_batch_dagster.core.judging import ReviewRule
from vllm_batch_dagster.stages import versions
from vllm_batch_dagster.stages.gold_sets import GoldRules, make_gold_set, read_gold
from vllm_batch_dagster.stages.pulling import PullPorts, pull_reviews
from vllm_batch_dagster.stages.review_export import ExportCounts, choose_examples, next_batch_lines
from vllm_batch_dagster.stages.training_sets import make_training_set
from vllm_batch_dagster.stages.versions import latest_version, write_version

LATEST = ReviewRule.LATEST


@pytest.fixture
def datasets(rig: Rig, tmp_path: Path) -> Path:
    """Reviews of nine answers: accepted 3, edited 2 and once without a change, rejected, skipped, preferred."""
    folder = tmp_path / "datasets"
    project = Project()
    said: list[dict[str, Any]] = [
        {"verdict": "accept", "rating": 5},
        {"verdict": "accept", "rating": 4},
        {"verdict": "accept", "rating": 2},
        {"verdict": "edit", "rating": 4, "correction": "Rome."},
        {"verdict": "edit", "rating": 3, "correction": "Bonn."},
        {"verdict": "edit", "rating": 5, "correction": "Paris."},
        {"verdict": "reject", "rating": 1},
        {"skipped": True},
    ]
    project.put(*(task(number, annotation(number, **each)) for number, each in enumerate(said)))
    project.put(task(8, annotation(8, verdict="reject", preference="B"), answers=("a", "b")))
    pull(project, rig, folder)
    return folder


def pull(project: Project, rig: Rig, datasets: Path) -> None:
    pull_reviews(project, PullPorts(rig.store, rig.files, rig.workspace, datasets / "reviewed", nullcontext))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_training_set(datasets: Path) -> None:
    version, counts = make_training_set(datasets, LATEST)
    assert (counts.items, counts.judged, dict(counts.unsettled)) == (9, 8, {"skipped": 1})
    assert dict(counts.lines) == {"sft": 5, "dpo": 3, "kto": 9}
    assert dict(counts.dropped["sft"]) == {"edited_without_a_change": 1, "rejected": 2}
    for name, count in counts.lines.items():
        assert len(lines(version.path / f"{name}.jsonl")) == count
        assert counts.judged == sum(counts.dropped[name].values()) + len(
            {line["metadata"]["custom_id"] for line in lines(version.path / f"{name}.jsonl")}
        )
    rows = polars.read_parquet(version.path / "judged-*.parquet")
    assert rows["custom_id"].to_list() == [f"id-{number}" for number in (0, 1, 2, 3, 4, 5, 6, 8)]
    assert rows["annotator"].unique().to_list() == ["1"]
    assert rows["sft_lines"].sum() == 5
    manifest = json.loads((version.path / "manifest.json").read_text())
    assert manifest["lines"] == {"sft": 5, "dpo": 3, "kto": 9}


def test_the_same_reviews_are_the_same_version(datasets: Path, rig: Rig) -> None:
    first, _ = make_training_set(datasets, LATEST)
    again, _ = make_training_set(datasets, LATEST)
    assert (first.id, first.is_new, again.id, again.is_new) == (again.id, True, first.id, False)
    project = Project()
    project.put(task(20, annotation(20, verdict="accept", rating=5)))
    pull(project, rig, datasets)
    new, counts = make_training_set(datasets, LATEST)
    assert (new.is_new, counts.lines["sft"]) == (True, 6)
    assert latest_version(datasets / "training") == new.path
    assert first.path.is_dir(), "older versions stay"


def test_a_version_is_whole_or_not_there(datasets: Path) -> None:
    first, _ = make_training_set(datasets, LATEST)

    def die(folder: Path) -> None:
        (folder / "sft.jsonl").write_text("half")
        raise OSError("killed")

    with pytest.raises(OSError, match="killed"):
        write_version(datasets / "training", die)
    assert latest_version(datasets / "training") == first.path
    again, _ = make_training_set(datasets, LATEST)
    assert not again.is_new
    assert {path.name for path in (datasets / "training").iterdir()} == {first.path.name, versions.LATEST}


def test_the_gold_set(datasets: Path) -> None:
    version, counts = make_gold_set(datasets, GoldRules(LATEST, 4))
    assert (counts.items, dict(counts.by_verdict)) == (3, {"accept": 2, "edit": 1})
    assert counts.left_out == {"rating_too_low": 2, "edited_without_a_change": 1, "rejected": 2, "skipped": 1}
    assert [(item.custom_id, item.expected) for item in read_gold(version.path)] == [
        ("id-0", "Paris."),
        ("id-1", "Paris."),
        ("id-3", "Rome."),
    ]


def test_a_prompt_of_several_batches_is_gold_once(datasets: Path, rig: Rig) -> None:
    before = {item.custom_id: item.id for item in read_gold(make_gold_set(datasets, GoldRules())[0].path)}
    project = Project()
    again = task(0, annotation(50, minute=20, verdict="edit", rating=5, correction="Lyon."), batch="batch_2")
    project.put(replace(again, id=100))
    pull(project, rig, datasets)
    version, counts = make_gold_set(datasets, GoldRules())
    items = {item.id: item for item in read_gold(version.path)}
    assert (counts.items, counts.left_out["repeated_prompt"]) == (3, 1)
    assert (items[before["id-0"]].expected, items[before["id-0"]].batch_id) == ("Lyon.", "batch_2")


def test_examples_are_the_best_ones(datasets: Path) -> None:
    counts = ExportCounts()
    examples = choose_examples(datasets, LATEST, 3, counts)
    assert [each.messages[1]["content"] for each in examples] == ["Rome.", "Bonn.", "Paris."]
    assert examples[2].messages[0]["content"] == "question 0", "the best rating of the accepted ones"
    assert counts.left_out["skipped"] == 1


def test_the_next_batch_asks_rejected_and_edited_prompts(datasets: Path) -> None:
    counts = ExportCounts()
    examples = choose_examples(datasets, LATEST, 1, ExportCounts())
    made = [json.loads(line) for line in next_batch_lines(datasets, LATEST, ["reject"], examples, "big", counts)]
    assert [line["custom_id"] for line in made] == ["batch_1/id-6", "batch_1/id-8"]
    assert [message["content"] for message in made[0]["body"]["messages"]] == ["question 3", "Rome.", "question 6"]
    assert {line["body"]["model"] for line in made} == {"big"}
    assert (counts.written, counts.endpoint) == (2, "/v1/chat/completions")
    assert counts.left_out == {"other_verdict": 6, "skipped": 1}


def test_no_reviews_make_empty_sets(tmp_path: Path) -> None:
    version, counts = make_training_set(tmp_path, LATEST)
    assert (counts.items, (version.path / "sft.jsonl").read_bytes()) == (0, b"")
    assert make_gold_set(tmp_path, GoldRules())[1].items == 0
    assert list(next_batch_lines(tmp_path, LATEST, ["reject"], [], "", ExportCounts())) == []
