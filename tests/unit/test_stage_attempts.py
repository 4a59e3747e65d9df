"""One attempt at a chunk, without an engine: what it knows of earlier ones, and which answer of a line holds."""

import pytest

from tests.unit.conftest import Rig, answer, answer_of, id_range, ids
from vllm_batch_dagster.core.errors import StaleAttempt
from vllm_batch_dagster.core.models import RequestCounts, Usage
from vllm_batch_dagster.stages.attempts import ChunkAttempt, Progress


def pending(attempt: ChunkAttempt) -> list[int]:
    return [line.line for line in attempt.pending_lines()]


def test_the_first_answer_of_a_line_wins_over_epochs(rig: Rig) -> None:
    batch_id = rig.start(3)
    first = rig.begin(batch_id)
    old = list(first.pending_lines())
    second = rig.begin(batch_id)
    for line in second.pending_lines():
        if line.line != 2:
            answer(line)
    answer(old[0], ok=False)  # a superseded attempt that has not noticed yet
    first.close()
    second.close()
    third = rig.begin(batch_id)
    assert pending(third) == [2]
    assert third.describe().endswith("2 of 3 lines answered by earlier attempts, sending 1")
    answer(next(third.pending_lines()))
    assert third.is_durable
    third.close()
    summary = third.publish()
    assert summary.counts == RequestCounts(3, 2, 1)
    assert (summary.replayed, summary.sent) == (2, 1)
    rig.merge(batch_id)
    assert [(row["custom_id"], row["response"]["body"]["epoch"]) for row in rig.output(batch_id)] == [
        ("id-1", 2),
        ("id-2", 3),
    ]
    assert ids(rig.errors(batch_id)) == ["id-0"]


def test_a_second_answer_in_one_attempt_is_not_written(rig: Rig) -> None:
    batch_id = rig.start(2)
    attempt = rig.begin(batch_id)
    line = next(attempt.pending_lines())
    answer(line)
    answer(line, ok=False)
    attempt.close()
    assert [(record.line, record.ok) for record in rig.journal(batch_id, 0, 1)] == [(0, True)]


def test_an_answer_counts_only_when_it_is_on_disk(rig: Rig) -> None:
    batch_id = rig.start(1)
    attempt = rig.begin(batch_id)
    body = b'{"usage":{"prompt_tokens":3,"completion_tokens":4}}'
    attempt.accept(next(attempt.pending_lines()), answer_of(body), True, 1)
    assert (attempt.is_answered, attempt.is_durable, attempt.uncommitted) == (True, False, 1)
    attempt.mirror_progress()
    assert rig.batch(batch_id).counts == RequestCounts(1, 0, 0)
    commit = attempt.take_commit()
    assert (attempt.is_durable, attempt.uncommitted) == (False, 0)
    attempt.commit(commit)
    assert attempt.is_durable
    assert commit.progress == Progress(1, 0, Usage(input_tokens=3, output_tokens=4))
    attempt.mirror_progress()
    assert rig.batch(batch_id).counts == RequestCounts(1, 1, 0)
    assert rig.batch(batch_id).usage == Usage(input_tokens=3, output_tokens=4)
    attempt.close()


def test_closing_writes_what_is_left_and_may_be_repeated(rig: Rig) -> None:
    batch_id = rig.start(1)
    attempt = rig.begin(batch_id)
    attempt.accept(next(attempt.pending_lines()), answer_of(b"{}"), True, 1)
    attempt.close()
    attempt.close()
    assert [record.line for record in rig.journal(batch_id, 0, 1)] == [0]


def test_a_fresh_attempt_forgets_the_answers_before_it_and_later_ones_do_too(rig: Rig) -> None:
    batch_id = rig.start(2)
    first = rig.begin(batch_id)
    for line in first.pending_lines():
        answer(line)
    first.close()
    fresh = rig.begin(batch_id, fresh=True)
    assert pending(fresh) == [0, 1]
    answer(next(fresh.pending_lines()))
    fresh.close()
    resumed = rig.begin(batch_id)
    assert pending(resumed) == [1]
    resumed.close()
    resumed.publish(reason="engine_failure")
    rig.merge(batch_id)
    assert [row["response"]["body"] for row in rig.output(batch_id)] == [{"epoch": 2}]
    assert ids(rig.errors(batch_id)) == ["id-1"]


def test_publishing_twice_changes_nothing(rig: Rig) -> None:
    batch_id = rig.start(2)
    attempt = rig.begin(batch_id)
    for line in attempt.pending_lines():
        answer(line)
    attempt.close()
    path = rig.workspace.result_path(batch_id, 0, 1)
    first = attempt.publish()
    packed, version = path.read_bytes(), rig.batch(batch_id).result_version
    assert attempt.publish() == first
    assert (path.read_bytes(), rig.batch(batch_id).result_version) == (packed, version)


def test_a_superseded_attempt_may_give_back_but_not_report_or_publish(rig: Rig) -> None:
    batch_id = rig.start(2)
    old = rig.begin(batch_id)
    answer(next(old.pending_lines()))
    new = rig.begin(batch_id)
    with pytest.raises(StaleAttempt):
        old.mirror_progress()
    with pytest.raises(StaleAttempt):
        old.publish(reason="engine_failure")
    old.give_back("engine_failure")
    assert rig.store.chunks.get(batch_id, 0).engine_failures == 0
    assert rig.batch(batch_id).result_version == 0
    old.close()
    new.close()


def test_equal_answers_have_an_equal_digest_whatever_the_attempt(rig: Rig) -> None:
    def digest(body: bytes) -> str:
        attempt = rig.begin(batch_id, fresh=True)
        for line in attempt.pending_lines():
            attempt.accept(line, answer_of(body), True, 1)
        attempt.close()
        return attempt.publish().digest

    batch_id = rig.start(2)
    assert digest(b'{"same":1}') == digest(b'{"same":1}') != digest(b'{"other":1}')


def test_the_chunk_is_read_through_its_own_part_of_the_index(rig: Rig) -> None:
    batch_id = rig.start(7, chunk_size=3)
    attempt = rig.begin(batch_id, chunk=1)
    lines = list(attempt.pending_lines())
    assert [line.custom_id for line in lines] == id_range(3, 6)
    assert [line.request_id for line in lines] == [f"{batch_id}-{number}" for number in range(3, 6)]
    attempt.close()


async def test_the_digest_of_a_chunk_does_not_hang_on_the_order_of_arrival(rig: Rig) -> None:
    digests = []
    for order in ((0, 1, 2), (2, 0, 1)):
        batch_id = rig.start(3)
        attempt = rig.begin(batch_id)
        lines = list(attempt.pending_lines())
        for number in order:
            attempt.accept(lines[number], answer_of(b'{"line":%d}' % number), True, 1)
        attempt.commit(attempt.take_commit())
        attempt.close()
        digests.append(attempt.publish().digest)
    assert digests[0] == digests[1]


async def test_lines_that_were_given_up_are_counted_beside_the_ten_commonest_errors(rig: Rig) -> None:
    batch_id = rig.start(40, chunk_size=40)
    attempt = rig.begin(batch_id)
    for number, line in enumerate(attempt.pending_lines()):
        if number < 39:
            attempt.accept(line, answer_of(b'{"error":{"type":"kind %d"}}' % (number % 13), 400), False, 1)
    attempt.close()
    assert attempt.publish("engine_failure").error_codes["engine_failure"] == 1
