"""Numbers 39 to 50 of the checklist: the states of a batch, its results, and how it is stopped."""

from collections.abc import Mapping, Sequence
from typing import Any

import httpx2
import openai
import pytest
from openai.types import Batch

from tests.conformance.envelope import read_error
from tests.conformance.inputs import expiring
from tests.conformance.sending import sent_by
from tests.conformance.submissions import Submission, Submissions, finish_again, read_lines
from tests.target import Target

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

MORE_MINUTES = 4  # for a machine that cannot begin within one
PATH = ("validating", "in_progress", "finalizing", "completed")

Lines = Sequence[Mapping[str, Any]]


def read_results(submission: Submission) -> tuple[Lines, Lines]:
    """Return the lines of the output file and of the error file of a batch that has ended."""
    batch = submission.newest
    return (
        read_lines(submission.client, batch.output_file_id),
        read_lines(submission.client, batch.error_file_id),
    )


def ids(lines: Lines) -> Sequence[str]:
    return sorted(line["custom_id"] for line in lines)


def counts(batch: Batch) -> tuple[int, int, int]:
    assert batch.request_counts is not None
    return batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed


def test_h039_statuses_and_their_times(submissions: Submissions) -> None:
    submissions.finish("mixed")
    seen = submissions["mixed"].seen
    statuses = list(dict.fromkeys(batch.status for batch in seen))
    assert statuses == [status for status in PATH if status in statuses]
    assert (statuses[0], statuses[-1]) == (PATH[0], PATH[-1])
    for batch in seen:
        times = [batch.created_at, *(getattr(batch, f"{status}_at") for status in PATH[1:])]
        reached = PATH.index(str(batch.status)) + 1
        assert None not in times[:reached]
        assert times[reached:] == [None] * (len(PATH) - reached)
        assert times[:reached] == sorted(times[:reached])


def test_h040_every_line_succeeds(submissions: Submissions) -> None:
    batch = submissions.finish("all_good")
    output, errors = read_results(submissions["all_good"])
    sent = len(submissions["all_good"].lines)
    assert (batch.status, batch.error_file_id, errors) == ("completed", None, ())
    assert counts(batch) == (sent, sent, 0)
    assert len(output) == sent


def test_h041_some_lines_fail(submissions: Submissions) -> None:
    batch = submissions.finish("mixed")
    output, errors = read_results(submissions["mixed"])
    assert counts(batch) == (3, 2, 1)
    assert (len(output), len(errors)) == (2, 1)


def test_h042_every_line_fails(submissions: Submissions) -> None:
    batch = submissions.finish("all_refused")
    assert (batch.status, batch.output_file_id, batch.errors) == ("completed", None, None)
    assert counts(batch) == (2, 0, 2)
    assert len(read_results(submissions["all_refused"])[1]) == 2


def test_h043_a_refused_line_carries_its_response(submissions: Submissions) -> None:
    submissions.finish("mixed")
    (refused,) = read_results(submissions["mixed"])[1]
    assert refused["custom_id"] == "line-2"
    assert refused["error"] is None
    assert 400 <= refused["response"]["status_code"] < 500
    assert refused["response"]["body"]["error"]["message"]


def test_h044_every_id_comes_back_once(submissions: Submissions) -> None:
    for name in ("mixed", "all_good", "all_refused", "cut", "expiring"):
        submissions.finish(name)
        output, errors = read_results(submissions[name])
        assert ids([*output, *errors]) == ids(submissions[name].lines), name
        assert all(line["id"].startswith("batch_req_") for line in (*output, *errors))
        assert len({line["id"] for line in (*output, *errors)}) == len(submissions[name].lines)


def test_h045_the_keys_of_an_output_line(submissions: Submissions) -> None:
    for name in ("mixed", "all_good"):
        submissions.finish(name)
        for line in read_results(submissions[name])[0]:
            assert line.keys() == {"id", "custom_id", "response", "error"}
            assert line["response"].keys() == {"status_code", "request_id", "body"}
            assert (line["response"]["status_code"], line["error"]) == (200, None)


def test_h046_an_expired_batch_keeps_what_is_done(target: Target, submissions: Submissions) -> None:
    submissions.finish("expiring")
    expired = submissions["expiring"]
    if expired.newest.output_file_id is None:
        expired = finish_again(expired.client, expiring(target, MORE_MINUTES))
    batch = expired.newest
    output, errors = read_results(expired)
    assert batch.status == "expired"
    assert batch.expired_at is not None
    assert batch.expires_at is not None
    assert batch.expired_at >= batch.expires_at
    assert output, "no line was done: the server was too slow to tell"
    assert all(line["error"] is None for line in output)
    assert {(line["response"], line["error"]["code"]) for line in errors} == {(None, "batch_expired")}
    assert counts(batch) == (len(output) + len(errors), len(output), len(errors))


def test_h047_a_cancelled_batch_keeps_what_is_done(submissions: Submissions) -> None:
    batch = submissions.finish("cut")
    answer = submissions["cut"].acted
    assert answer is not None, f"it ended before it could be cancelled: {batch}"
    assert answer.status == "cancelling"
    assert answer.cancelling_at is not None
    assert batch.status == "cancelled"
    assert batch.cancelled_at is not None
    assert answer.cancelling_at == batch.cancelling_at <= batch.cancelled_at
    output, errors = read_results(submissions["cut"])
    assert output
    assert {(line["response"], line["error"]["code"]) for line in errors} == {(None, "batch_cancelled")}
    assert counts(batch) == (len(output) + len(errors), len(output), len(errors))


def test_h048_cancel_without_a_body(submissions: Submissions) -> None:
    batch = submissions.finish("largest")
    answer = submissions["largest"].acted
    assert answer is not None, f"it was never in progress: {batch}"
    assert answer.status == "cancelling"
    assert batch.status == "cancelled"


def test_h049_cancel_of_a_finished_batch(plain: httpx2.Client, submissions: Submissions) -> None:
    cancelled = submissions.finish("cut")
    answer = plain.post(f"batches/{cancelled.id}/cancel")
    assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
    for name, status in (("mixed", "completed"), ("broken", "failed")):
        error = read_error(plain.post(f"batches/{submissions.finish(name).id}/cancel"), 409)
        assert error["message"] == f"Cannot cancel a batch with status '{status}'."


def test_h050_the_409_is_sent_once(strict_client: openai.OpenAI, submissions: Submissions) -> None:
    batch_id = submissions.finish("mixed").id
    with sent_by(strict_client) as sent, pytest.raises(openai.ConflictError) as refusal:
        strict_client.batches.cancel(batch_id)
    assert refusal.value.response.headers["x-should-retry"] == "false"
    assert len([request for request in sent if request.url.path.endswith("/cancel")]) == 1
