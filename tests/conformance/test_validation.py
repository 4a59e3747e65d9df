"""Numbers 51 to 58 of the checklist: what makes a batch fail before any line runs."""

from collections.abc import Sequence

import pytest
from openai.types import Batch, BatchError

from tests.conformance.inputs import MOST_LINES, REQUIRED
from tests.conformance.submissions import Submissions, read_lines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

Found = Sequence[tuple[str | None, str | None]]


def errors_of(batch: Batch) -> Sequence[BatchError]:
    """Return the errors of a batch that failed without any inference."""
    assert batch.status == "failed"
    assert batch.failed_at is not None
    assert (batch.output_file_id, batch.error_file_id) == (None, None)
    assert (batch.in_progress_at, batch.finalizing_at, batch.completed_at) == (None, None, None)
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 0, "completed": 0, "failed": 0}
    assert batch.errors is not None
    assert batch.errors.data
    assert all(error.message for error in batch.errors.data)
    return batch.errors.data


def faults(submissions: Submissions, *lines: int) -> Found:
    """Return (code, param) of the errors of some lines of the faulty file."""
    errors = errors_of(submissions.finish("faulty"))
    return [(error.code, error.param) for error in errors if error.line in lines]


def test_h051_broken_json(submissions: Submissions) -> None:
    errors = errors_of(submissions.finish("broken"))
    assert [(error.code, error.line) for error in errors] == [("invalid_json_line", 2)]


def test_h052_missing_fields(submissions: Submissions) -> None:
    for number, name in enumerate(REQUIRED, 1):
        assert faults(submissions, number) == [("missing_required_parameter", name)]


def test_h053_duplicate_ids(submissions: Submissions) -> None:
    """Lines 5 and 6 have one id. The ids of `all_good` are those of other batches, and it completes."""
    assert [code for code, _ in faults(submissions, 5, 6)] == ["duplicate_custom_id"]
    assert [code for code, _ in faults(submissions, 6)] == ["duplicate_custom_id"]
    same = {line["custom_id"] for line in submissions["all_good"].lines}
    assert same <= {line["custom_id"] for line in submissions["mixed"].lines}
    assert submissions.finish("all_good").status == "completed"


def test_h054_urls(submissions: Submissions) -> None:
    assert faults(submissions, 7) == [("invalid_url", "url")]
    assert_lenient(submissions)


def test_h055_streaming(submissions: Submissions) -> None:
    assert faults(submissions, 8) == [("streaming_unsupported", "body.stream")]


def test_h056_models(submissions: Submissions) -> None:
    assert faults(submissions, 9) == [("model_not_found", "body.model")]
    assert [code for code, _ in faults(submissions, 10)] == ["invalid_request"]


def test_h057_two_models(submissions: Submissions) -> None:
    assert [code for code, _ in faults(submissions, 11)] == ["mismatched_model"]
    assert_lenient(submissions)


def test_h058_the_most_requests(submissions: Submissions) -> None:
    largest = submissions.finish("largest")
    assert largest.status == "cancelled", "it was accepted, and then cancelled by us"
    assert largest.request_counts is not None
    assert largest.request_counts.total == MOST_LINES
    for name in ("too_large", "too_many_inputs"):
        assert all(error.code for error in errors_of(submissions.finish(name))), name


def assert_lenient(submissions: Submissions) -> None:
    """One file with two urls and two models runs when the batch asks for lenient validation."""
    submission = submissions["lenient"]
    batch = submissions.finish("lenient")
    assert (batch.status, batch.errors, batch.error_file_id) == ("completed", None, None)
    output = read_lines(submission.client, batch.output_file_id)
    kinds = {line["custom_id"]: line["response"]["body"]["object"] for line in output}
    assert kinds == {"line-1": "chat.completion", "line-2": "list"}
