"""Properties of a batch's way through the store and the merge: whatever happens in whatever order."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.conftest import DAY, Rig, answer, id_range, ids
from vllm_batch_dagster.adapters.memory import MemoryFiles, MemoryStore
from vllm_batch_dagster.core.errors import StateConflict
from vllm_batch_dagster.core.models import Batch, RequestCounts
from vllm_batch_dagster.core.reconciling import contiguous_ranges
from vllm_batch_dagster.core.states import TERMINAL, TIMESTAMP_FIELD, BatchEvent, BatchStatus

BATCH = Batch("batch_1", "file-1", "/v1/embeddings", "24h", BatchStatus.VALIDATING, 1000, 1000 + DAY)


@pytest.fixture(scope="module")
def long_lived(tmp_path_factory: pytest.TempPathFactory) -> Rig:
    """One rig for all examples; each has a batch of its own."""
    rig = Rig(tmp_path_factory.mktemp("rig"))
    rig.files = MemoryFiles()
    return rig


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_merge_of_any_interleaving_conserves_ids_and_order(long_lived: Rig, data: st.DataObject) -> None:
    rig, total = long_lived, data.draw(st.integers(1, 8), label="lines")
    batch_id = rig.start(total, chunk_size=data.draw(st.integers(1, 4), label="chunk size"))
    outcome = st.sampled_from([True, False, None])
    first: dict[int, bool] = {}
    for chunk in rig.store.chunks.list(batch_id):
        lines = range(chunk.range.first_line, chunk.range.first_line + chunk.range.line_count)
        for _attempt in range(data.draw(st.integers(1, 2), label="attempts")):
            drawn = {line: data.draw(outcome) for line in lines}
            outcomes = {line: ok for line, ok in drawn.items() if ok is not None}
            attempt = rig.begin(batch_id, chunk.index)
            pending = {line.line: line for line in attempt.pending_lines()}
            for number in data.draw(st.permutations(sorted(outcomes.keys() & pending.keys()))):
                answer(pending[number], ok=outcomes[number])
            attempt.close()
            first = outcomes | first
        attempt.publish(reason="engine_failure")
    rig.merge(batch_id)
    good = [f"id-{line}" for line in range(total) if first.get(line)]
    bad = [name for name in id_range(total) if name not in good]
    assert (ids(rig.output(batch_id)), ids(rig.errors(batch_id))) == (good, bad)
    unanswered = [row["custom_id"] for row in rig.errors(batch_id) if row["response"] is None]
    assert unanswered == [f"id-{line}" for line in range(total) if line not in first]
    assert rig.batch(batch_id).counts == RequestCounts(total, len(good), len(bad))


@given(st.lists(st.tuples(st.sampled_from(BatchEvent), st.integers(0, 5000)), max_size=12))
def test_no_events_leave_a_terminal_state_and_times_never_go_back(steps: list[tuple[BatchEvent, int]]) -> None:
    store = MemoryStore()
    store.batches.add(BATCH)
    before, entered = BATCH, [BATCH.created_at]
    for event, now in steps:
        try:
            batch = store.batches.advance(BATCH.id, event, now)
        except StateConflict:
            assert store.batches.get(BATCH.id) == before
            continue
        assert before.status not in TERMINAL
        field = TIMESTAMP_FIELD[batch.status]
        entered.append(getattr(batch, field))
        assert entered == sorted(entered)
        assert entered[-1] >= now
        assert replace(batch, status=before.status, **{field: None}) == replace(before, **{field: None})
        assert batch.is_terminal == (batch.status in TERMINAL)
        before = batch
    assert len(store.events(BATCH.id)) == (before.status in TERMINAL)


@given(st.sets(st.integers(0, 60)))
def test_ranges_cover_exactly_the_missing_chunks_and_no_two_touch(missing: set[int]) -> None:
    ranges = contiguous_ranges(sorted(missing))
    assert [index for first, last in ranges for index in range(first, last + 1)] == sorted(missing)
    assert all(before[1] + 1 < after[0] for before, after in pairwise(ranges))
