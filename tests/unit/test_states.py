"""The state machine as a whole: what no sequence of events can do."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_batch_dagster.core.errors import StateConflict
from vllm_batch_dagster.core.models import Batch
from vllm_batch_dagster.core.states import (
    TERMINAL,
    TIMESTAMP_FIELD,
    TRANSITIONS,
    BatchEvent,
    BatchStatus,
    advance,
    sources_of,
)

events = st.sampled_from(BatchEvent)
statuses = st.sampled_from(BatchStatus)
# The moves that OpenAI documents (contract C.3), written down a second time on purpose.
SUCCESSORS = {
    "validating": {"failed", "in_progress", "cancelling", "expired"},
    "in_progress": {"finalizing", "cancelling", "expired"},
    "finalizing": {"completed", "cancelling", "expired"},
    "cancelling": {"cancelled"},
    "failed": set(),
    "completed": set(),
    "expired": set(),
    "cancelled": set(),
}


def walk(path: list[BatchEvent]) -> list[BatchStatus]:
    """The statuses that a batch goes through when illegal events are refused."""
    visited = [BatchStatus.VALIDATING]
    for event in path:
        try:
            visited.append(advance(visited[-1], event))
        except StateConflict:
            continue
    return visited


@given(statuses, events)
def test_an_event_moves_as_the_table_says_or_is_refused(status: BatchStatus, event: BatchEvent) -> None:
    if (status, event) in TRANSITIONS:
        assert advance(status, event) is TRANSITIONS[status, event]
    else:
        with pytest.raises(StateConflict, match=f"{status.value}.*{event.value}"):
            advance(status, event)


@given(st.lists(events, max_size=12))
def test_every_path_is_legal_and_short(path: list[BatchEvent]) -> None:
    visited = walk(path)
    assert all(after.value in SUCCESSORS[before.value] for before, after in pairwise(visited))
    assert len(set(visited)) == len(visited)  # no loops, so a store's retry of compare-and-set ends


@given(st.sampled_from(sorted(TERMINAL)), st.lists(events, min_size=1, max_size=12))
def test_there_is_no_way_out_of_a_terminal_state(status: BatchStatus, path: list[BatchEvent]) -> None:
    for event in path:
        with pytest.raises(StateConflict):
            advance(status, event)


@given(statuses, events)
def test_the_sources_of_an_event_agree_with_the_table(status: BatchStatus, event: BatchEvent) -> None:
    assert (status in sources_of(event)) == ((status, event) in TRANSITIONS)


def test_terminal_is_what_has_no_successor() -> None:
    assert {status for status in BatchStatus if not SUCCESSORS[status.value]} == TERMINAL


def test_every_state_is_reached_and_every_open_one_can_be_cancelled_or_is_stopping() -> None:
    assert set(TRANSITIONS.values()) | {BatchStatus.VALIDATING} == set(BatchStatus)
    assert sources_of(BatchEvent.CANCEL) == set(BatchStatus) - TERMINAL - {BatchStatus.CANCELLING}


def test_every_status_but_the_first_has_a_time_that_a_batch_knows() -> None:
    assert set(TIMESTAMP_FIELD) == set(BatchStatus) - {BatchStatus.VALIDATING}
    assert set(TIMESTAMP_FIELD.values()) <= set(Batch.__slots__)
