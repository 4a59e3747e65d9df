"""What is decided about a delivery: when it is due, when it is over, who may take it."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from vllm_batch_dagster.core.deliveries import (
    MOST_ERROR_CHARACTERS,
    DeliveryRecord,
    DeliveryState,
    Wanted,
    claim,
    is_exhausted,
    is_superseded,
    is_wanted,
    new_delivery,
    plan,
    reopen,
    settle,
)
from vllm_batch_dagster.core.models import Batch
from vllm_batch_dagster.core.states import BatchStatus
from vllm_batch_dagster.core.webhooks import GIVE_UP_SECONDS, LONGEST_PAUSE_SECONDS, Outcome

NOW = 1_800_000_000
PENDING, DELIVERED, DEAD = DeliveryState.PENDING, DeliveryState.DELIVERED, DeliveryState.DEAD
FAILED = Outcome(False, reason="away")
NEW = new_delivery("batch_1", "evt_1", "handler:a", NOW, version=1)
BATCH = Batch("batch_1", "file-1", "/v1/embeddings", "24h", BatchStatus.COMPLETED, NOW, NOW, merged_version=3)

texts = st.text("abc :", max_size=5)


def attempt(delivery: DeliveryRecord, outcome: Outcome, now: int) -> DeliveryRecord:
    return settle(claim(delivery, "run", now + 90), outcome, now)


@given(st.tuples(texts, texts, st.integers(0, 3)), st.tuples(texts, texts, st.integers(0, 3)))
def test_the_id_says_event_target_and_version(first: tuple[str, str, int], second: tuple[str, str, int]) -> None:
    ids = [new_delivery("batch_1", f"evt_{e}", f"handler:{t}", NOW, version=v).id for e, t, v in (first, second)]
    told = [f"evt_{e} handler:{t} {v}" for e, t, v in (first, second)]
    assert (ids[0] == ids[1]) == (told[0] == told[1])


@given(st.lists(st.integers(0, 20_000), max_size=80))
def test_attempts_go_on_for_72_hours_and_then_end(delays: list[int]) -> None:
    """However late each attempt comes and ends: the next one lies ahead and within the time, or it is dead."""
    delivery, now = NEW, NOW
    for delay in delays:
        now = delivery.next_attempt_at + delay
        delivery = attempt(delivery, FAILED, now)
        assert delivery.claimed_by is None
        if delivery.state is DEAD:
            assert now >= NOW + GIVE_UP_SECONDS
            return
        assert now < delivery.next_attempt_at <= min(now + 1.2 * LONGEST_PAUSE_SECONDS, NOW + GIVE_UP_SECONDS) + 1
    assert now < NOW + GIVE_UP_SECONDS


def test_the_number_of_attempts_in_72_hours_is_small() -> None:
    delivery, count = NEW, 0
    while delivery.state is PENDING:
        delivery, count = attempt(delivery, FAILED, delivery.next_attempt_at), count + 1
    assert 20 < count < 40


def test_success_and_failure() -> None:
    failed = attempt(NEW, FAILED, NOW + 5)
    assert (failed.state, failed.attempts, failed.last_error, failed.delivered_at) == (PENDING, 1, "away", None)
    done = attempt(failed, Outcome(True, 200), NOW + 20)
    assert (done.state, done.attempts, done.last_error, done.delivered_at) == (DELIVERED, 2, None, NOW + 20)


def test_what_no_retry_can_mend_is_dead_at_once() -> None:
    gone = attempt(NEW, Outcome(False, reason="deleted", is_final=True), NOW)
    assert (gone.state, gone.last_error) == (DEAD, "deleted")


def test_a_long_reason_is_cut() -> None:
    assert len(attempt(NEW, Outcome(False, reason="x" * 9_999), NOW).last_error or "") == MOST_ERROR_CHARACTERS


def test_who_takes_what() -> None:
    waiting = replace(NEW, next_attempt_at=NOW + 60)
    held = claim(NEW, "run 1", NOW + 60)
    done, dead = replace(NEW, state=DELIVERED), replace(NEW, state=DEAD)
    for delivery, wanted_by in (
        (NEW, set(Wanted)),
        (waiting, {Wanted.UNDELIVERED, Wanted.ALL}),
        (held, set[Wanted]()),
        (dead, {Wanted.UNDELIVERED, Wanted.ALL}),
        (done, {Wanted.ALL}),
    ):
        assert {wanted for wanted in Wanted if is_wanted(delivery, wanted, NOW)} == wanted_by
    assert is_wanted(held, Wanted.DUE, NOW, forerunners=["run 1"])
    assert is_wanted(held, Wanted.DUE, NOW + 60)


def test_a_replay_begins_anew_under_the_same_id() -> None:
    dead = replace(attempt(NEW, FAILED, NOW), state=DEAD, attempts=30)
    later = NOW + 10 * GIVE_UP_SECONDS
    again = reopen(dead, later)
    assert (again.id, again.state, again.attempts, again.last_error) == (NEW.id, PENDING, 0, "away")
    assert attempt(again, FAILED, later).state is PENDING


def test_a_target_that_takes_its_process_down_comes_to_an_end() -> None:
    held = claim(NEW, "run", NOW + 60)
    assert not is_exhausted(held, NOW + GIVE_UP_SECONDS)
    assert is_exhausted(held, NOW + GIVE_UP_SECONDS + 1)
    assert not is_exhausted(NEW, NOW + 2 * GIVE_UP_SECONDS)


def test_webhooks_are_told_once_and_handlers_of_each_version() -> None:
    targets = ["webhook:we_1", "handler:a"]
    first = plan("evt_1", BATCH, targets, NOW, first=True)
    again = plan("evt_1", replace(BATCH, merged_version=4), targets, NOW, first=False)
    assert [(each.target, each.version) for each in first] == [("webhook:we_1", 0), ("handler:a", 3)]
    assert [(each.target, each.version) for each in again] == [("handler:a", 4)]
    assert {each.project_id for each in first} == {BATCH.project_id}
    assert [is_superseded(each, 4) for each in (*first, *again)] == [False, True, False]
