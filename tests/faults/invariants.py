"""What holds for a batch after anything: the promises of docs/reliability.md, checked from outside."""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.faults.observer import Path as StatusPath
from vllm_batch_dagster.adapters.simulated.answers import Limits, answer_request
from vllm_batch_dagster.core.journal import read_records

Line = Mapping[str, Any]

STOPPED = {"cancelled": "batch_cancelled", "expired": "batch_expired"}


def digest(body: Mapping[str, Any]) -> str:
    """Return a digest of an answer without what differs from run to run: its id."""
    return hashlib.sha256(json.dumps({**body, "id": ""}, sort_keys=True).encode()).hexdigest()


def expected_digest(line: Line) -> str:
    """Return the digest of the answer of an undisturbed run: the simulated engine is a function of the body."""
    limits = Limits((line["body"]["model"],), 2048)
    return digest(answer_request(line["url"], line["body"], "", limits).body)


def check_answers(
    lines: Sequence[Line], status: str, answers: Sequence[Line], errors: Sequence[Line], counts: Mapping[str, int]
) -> list[str]:
    """Return what is wrong with the files of a batch that has ended. An empty batch was stopped before it was read."""
    problems: list[str] = []
    total = counts["total"]
    if total == 0 and status in STOPPED:
        return ["files of a batch without lines"] if answers or errors else []
    wanted = [line["custom_id"] for line in lines]
    got = Counter(line["custom_id"] for line in (*answers, *errors))
    if lost := [name for name in wanted if not got[name]]:
        problems.append(f"{len(lost)} lines lost: {lost[:5]}")
    if doubled := [name for name, times in got.items() if times > 1]:
        problems.append(f"{len(doubled)} lines doubled: {doubled[:5]}")
    if (len(answers), len(errors)) != (counts["completed"], counts["failed"]) or total != len(wanted):
        problems.append(
            f"{len(answers)} answers and {len(errors)} errors of {len(wanted)} lines, counts {dict(counts)}"
        )
    by_id = {line["custom_id"]: line for line in lines}
    place = {name: number for number, name in enumerate(wanted)}
    for kind, found in (("output", answers), ("error", errors)):
        order = [place[line["custom_id"]] for line in found]
        if order != sorted(order):
            problems.append(f"the {kind} file is not in input order")
    for answer in answers:
        if digest(answer["response"]["body"]) != expected_digest(by_id[answer["custom_id"]]):
            problems.append(f"{answer['custom_id']} has another answer than in an undisturbed run")
    code = STOPPED.get(status)
    if strange := [line for line in errors if not (line["error"] and line["error"]["code"] == code)]:
        problems.append(f"{len(strange)} unexpected errors, such as {strange[0]}")
    return problems


def check_path(path: StatusPath, status: str) -> list[str]:
    """Return what is wrong with what an observer saw of a batch that ended as `status`."""
    if not path.statuses:
        return ["the observer never saw the batch"]
    last = [] if path.statuses[-1].value == status else [f"the observer saw it last as {path.statuses[-1].value}"]
    return [*path.problems, *last]


def journalled(home: Path, batch_id: str) -> set[int]:
    """Return the lines that the journals of a batch hold."""
    lines: set[int] = set()
    for path in (home / "batches" / batch_id / "journal").rglob("*.jsonl"):
        with path.open("rb") as journal:
            lines |= {placed.record.line for placed in read_records(journal)}
    return lines


def asked(witness: Path, batch_id: str) -> list[int]:
    """Return the lines of a batch that have reached the engine, in order of arrival."""
    if not witness.exists():
        return []
    names = (name.rpartition("-") for name in witness.read_text().split())
    return [int(line) for batch, _, line in names if batch == batch_id]


def check_redone(durable: Collection[int], asked_after: Sequence[int]) -> list[str]:
    """`durable` are the lines whose answer was on disk when the fault came, `asked_after` what was sent since."""
    again = sorted(set(durable).intersection(asked_after))
    return [f"{len(again)} lines were sent again although their answer was durable: {again[:5]}"] if again else []
