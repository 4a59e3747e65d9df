"""The judges of the fault tests find what they are there for: a harness that finds nothing proves nothing."""

from collections.abc import Mapping
from typing import Any

import pytest

from tests.e2e.batches import chat
from tests.faults.chaos import WEIGHTS, plan_strikes
from tests.faults.invariants import Line, check_answers, check_redone
from tests.faults.matrix import OWN, PHASES, SOME_OWN, SOME_WIRE, WIRE, every_case
from tests.faults.observer import Path
from tests.faults.ratchet import judge, read_known
from vllm_batch_dagster.adapters.simulated.answers import Limits, answer_request

LINES = [chat(number, "tiny") for number in range(3)]


def answered(line: Line, **changes: object) -> Line:
    body = answer_request(line["url"], line["body"], "some-id", Limits(("tiny",), 2048)).body | changes
    return {"custom_id": line["custom_id"], "response": {"status_code": 200, "body": body}, "error": None}


def cancelled(line: Line) -> Line:
    return {"custom_id": line["custom_id"], "response": None, "error": {"code": "batch_cancelled"}}


GOOD = [answered(line) for line in LINES]


def test_good_files_pass() -> None:
    assert check_answers(LINES, "completed", GOOD, [], {"total": 3, "completed": 3, "failed": 0}) == []
    counts = {"total": 3, "completed": 2, "failed": 1}
    assert check_answers(LINES, "cancelled", GOOD[:2], [cancelled(LINES[2])], counts) == []
    assert check_answers(LINES, "cancelled", [], [], {"total": 0, "completed": 0, "failed": 0}) == []


@pytest.mark.parametrize(
    ("answers", "errors", "words"),
    [
        (GOOD[:2], [], "1 lines lost"),
        ([*GOOD, GOOD[0]], [], "1 lines doubled"),
        ([GOOD[1], GOOD[0], GOOD[2]], [], "not in input order"),
        ([*GOOD[:2], answered(LINES[2], choices=[])], [], "another answer"),
        (GOOD[:2], [cancelled(LINES[2])], "unexpected errors"),
    ],
)
def test_each_fault_of_the_files_is_found(answers: list[Line], errors: list[Line], words: str) -> None:
    counts = {"total": 3, "completed": len(answers), "failed": len(errors)}
    assert any(words in problem for problem in check_answers(LINES, "completed", answers, errors, counts))


def test_counts_that_differ_from_the_files_are_found() -> None:
    assert check_answers(LINES, "completed", GOOD, [], {"total": 3, "completed": 2, "failed": 1}) != []


def test_a_line_that_was_durable_must_not_be_sent_again() -> None:
    assert check_redone({0, 1}, [2, 3]) == []
    assert "1 lines were sent again" in check_redone({0, 1}, [2, 1])[0]


def seen(status: str, answered: int = 0, **marks: int) -> Mapping[str, Any]:
    names = (
        "in_progress_at",
        "finalizing_at",
        "completed_at",
        "failed_at",
        "expired_at",
        "cancelling_at",
        "cancelled_at",
    )
    counts = {"total": 9, "completed": answered, "failed": 0}
    return {"status": status, "created_at": 1, "request_counts": counts, **dict.fromkeys(names), **marks}


def watch(*looks: Mapping[str, Any]) -> list[str]:
    path = Path()
    for look in looks:
        path.add(look)
    return path.problems


def test_a_good_path_may_have_gaps() -> None:
    ended = seen("completed", 9, in_progress_at=2, finalizing_at=3, completed_at=4)
    assert watch(seen("validating"), seen("in_progress", 5, in_progress_at=2), ended) == []
    assert watch(seen("validating"), ended) == []


def test_a_bad_path_is_found() -> None:
    assert watch(seen("in_progress", in_progress_at=2), seen("validating")) != []
    assert watch(seen("in_progress", 5, in_progress_at=2), seen("in_progress", 4, in_progress_at=2)) != []
    assert watch(seen("in_progress", in_progress_at=5), seen("finalizing", in_progress_at=5, finalizing_at=4)) != []


def test_a_seed_gives_the_same_faults_again() -> None:
    assert plan_strikes(7, 5) == plan_strikes(7, 5) != plan_strikes(8, 5)
    assert plan_strikes(7, 60)[: len(plan_strikes(7, 5))] == plan_strikes(7, 5)
    assert {strike.fault for strike in plan_strikes(7, 120)} == set(WEIGHTS)


def test_the_ratchet_fails_for_what_is_new_and_for_what_is_mended() -> None:
    outcomes = {"a": [], "b": ["lost"], "c": ["doubled"], "d": []}
    verdict = judge(outcomes, {"b": "known", "d": "known", "not run": "known"})
    assert len(verdict) == 2
    assert "c is broken: doubled" in verdict[0]
    assert "d is mended" in verdict[1]


def test_known_cases_exist() -> None:
    cells = {f"{case.fault} @ {phase}" for case in every_case([*OWN, *WIRE]) for phase in case.phases}
    assert {name for name in read_known() if not name.startswith("chaos ")} <= cells


def test_the_tests_meet_every_fault_and_every_phase() -> None:
    some = (*SOME_OWN, *SOME_WIRE)
    assert {case.fault for case in some} == {*OWN, *WIRE}
    assert {phase for case in some for phase in case.phases} == set(PHASES)
    assert {phase for case in every_case(["one"]) for phase in case.phases} == set(PHASES)
