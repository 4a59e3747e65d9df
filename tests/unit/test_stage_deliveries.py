"""The drive of deliveries: claims before attempts, settles after them, lets no target hold up or harm another."""

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from vllm_batch_dagster.adapters.memory import FixedClock, MemoryStore
from vllm_batch_dagster.core.deliveries import DeliveryRecord, DeliveryState, Wanted, claim
from vllm_batch_dagster.core.errors import StateConflict, StorageFailure
from vllm_batch_dagster.core.models import Batch
from vllm_batch_dagster.core.ports import OutboxEvent
from vllm_batch_dagster.core.states import BatchEvent, BatchStatus
from vllm_batch_dagster.core.webhooks import GIVE_UP_SECONDS, Outcome
from vllm_batch_dagster.stages.deliveries import MOST_AT_ONCE, DeliveryPorts, close_untold, deliver_batch, replay

NOW = 1_800_000_000
PENDING, DELIVERED, DEAD = DeliveryState.PENDING, DeliveryState.DELIVERED, DeliveryState.DEAD
Answer = Callable[[DeliveryRecord], Outcome]


class Desk:
    """A batch that has ended, and a courier whose targets answer as the test says."""

    kind = "handler"
    limit_seconds = 50.0

    def __init__(self, **answers: Answer | Outcome) -> None:
        self.answers, self.seen = answers, list[DeliveryRecord]()
        self.store, self.clock = MemoryStore(), FixedClock(NOW)
        batch = Batch("batch_1", "file-1", "/v1/embeddings", "24h", BatchStatus.CANCELLING, NOW - 9, NOW, None)
        self.store.batches.add(replace(batch, result_version=1))
        self.store.batches.advance("batch_1", BatchEvent.STOPPED, NOW, merged_version=1, output_file_id="file-2")
        self._runs = itertools.count(1)
        self.beside: Sequence[Desk] = ()

    def targets(self, batch: Batch, event: OutboxEvent) -> Sequence[str]:
        return [f"{self.kind}:{name}" for name in self.answers]

    def attempt(self, delivery: DeliveryRecord, batch: Batch, event: OutboxEvent) -> Outcome:
        self.seen.append(delivery)
        answer = self.answers[delivery.name]
        return answer if isinstance(answer, Outcome) else answer(delivery)

    def run(self, wanted: Wanted = Wanted.DUE, **options: object) -> dict[str, DeliveryState]:
        ports = DeliveryPorts(self.store, [self, *self.beside], self.clock)
        shown = deliver_batch("batch_1", ports, wanted, run_id=f"run {next(self._runs)}", **options)  # type: ignore[arg-type]
        return {each.name: each.state for each in shown}

    def kept(self, name: str) -> DeliveryRecord:
        return next(each for each in self.store.deliveries.of_batch("batch_1") if each.name == name)

    @property
    def asked(self) -> list[str]:
        names = [each.name for each in self.seen]
        self.seen.clear()
        return sorted(names)


def raising(error: BaseException) -> Answer:
    def answer(_: DeliveryRecord) -> Outcome:
        raise error

    return answer


def test_each_target_is_asked_once_and_what_came_of_it_is_kept() -> None:
    desk = Desk(good=Outcome(True), bad=Outcome(False, reason="away"), gone=Outcome(False, reason="x", is_final=True))
    assert desk.run() == {"good": DELIVERED, "bad": PENDING, "gone": DEAD}
    assert desk.asked == ["bad", "gone", "good"]
    desk.run()
    assert desk.asked == []
    desk.clock.now = desk.kept("bad").next_attempt_at
    desk.run()
    assert desk.asked == ["bad"]


def test_an_attempt_is_claimed_before_it_is_made() -> None:
    """Under the same id as the one before, with the number of the attempt."""
    held: list[DeliveryRecord] = []

    def look(_: DeliveryRecord) -> Outcome:
        held.append(desk.kept("a"))
        return Outcome(False, reason="away")

    desk = Desk(a=look)
    desk.run()
    desk.clock.now = desk.kept("a").next_attempt_at
    desk.run()
    assert [(each.claimed_by, each.attempts) for each in held] == [("run 1", 1), ("run 2", 2)]
    assert len({each.id for each in (*held, *desk.seen)}) == 1
    assert all(each.next_attempt_at > NOW + desk.limit_seconds for each in held)


@pytest.mark.parametrize("error", [RuntimeError("broken"), StorageFailure("no disk"), SystemExit(3), GeneratorExit()])
def test_what_a_target_raises_is_its_own_failure(error: BaseException) -> None:
    desk = Desk(bad=raising(error), good=Outcome(True))
    assert desk.run() == {"bad": PENDING, "good": DELIVERED}
    assert (desk.kept("bad").last_error or "").startswith(type(error).__name__)


def test_targets_are_asked_at_the_same_time() -> None:
    """Each waits for all the others: one after the other, none would ever end."""
    meeting = threading.Barrier(MOST_AT_ONCE, timeout=45)

    def meet(_: DeliveryRecord) -> Outcome:
        meeting.wait()
        return Outcome(True)

    desk = Desk(**{f"target{number}": meet for number in range(MOST_AT_ONCE)})
    assert set(desk.run().values()) == {DELIVERED}


def test_more_targets_than_at_once() -> None:
    desk = Desk(**{f"target{number}": Outcome(True) for number in range(2 * MOST_AT_ONCE + 1)})
    assert list(desk.run().values()) == [DELIVERED] * (2 * MOST_AT_ONCE + 1)


def test_one_that_hangs_is_left_to_itself_and_its_late_answer_does_not_count() -> None:
    released, ended = threading.Event(), threading.Event()

    def hang(_: DeliveryRecord) -> Outcome:
        released.wait()
        ended.set()
        return Outcome(True)

    desk, other = Desk(hanging=hang), Desk(good=Outcome(True))
    desk.limit_seconds = 0.2
    other.kind = "webhook"  # with a limit of its own: 0.2 s may be too short for a good one on a slow machine
    desk.beside = [other]
    assert desk.run() == {"hanging": PENDING, "good": DELIVERED}
    assert "no end after 0.2 s" in (desk.kept("hanging").last_error or "")
    released.set()
    assert ended.wait(50)
    assert desk.kept("hanging").state is PENDING


def test_a_good_target_is_settled_while_another_still_works() -> None:
    settled = threading.Event()

    def wait_for_the_other(_: DeliveryRecord) -> Outcome:
        while desk.kept("quick").state is not DELIVERED:
            settled.wait(0.01)
        return Outcome(True)

    desk = Desk(slow=wait_for_the_other, quick=Outcome(True))
    assert desk.run() == {"slow": DELIVERED, "quick": DELIVERED}


def test_a_run_that_is_stopped_gives_back_what_it_held() -> None:
    released = threading.Event()

    def wait(_: DeliveryRecord) -> Outcome:
        released.wait()
        return Outcome(True)

    def stop(message: str) -> None:
        raise KeyboardInterrupt

    desk = Desk(slow=wait, quick=Outcome(True))
    with pytest.raises(KeyboardInterrupt):
        desk.run(report=stop)
    released.set()
    assert desk.kept("quick").state is DELIVERED
    slow = desk.kept("slow")
    assert (slow.state, slow.claimed_by, slow.last_error) == (
        PENDING,
        None,
        "the run was stopped during the attempt",
    )


def test_what_another_run_holds_is_left_alone_until_its_time_is_over() -> None:
    desk = Desk(a=Outcome(False, reason="away"))
    desk.run()
    seen = desk.kept("a")
    assert desk.store.deliveries.change(seen, claim(seen, "other", NOW + 100))
    assert desk.asked == ["a"]
    desk.clock.now = NOW + 99
    desk.run(Wanted.ALL)
    assert desk.asked == []
    desk.run(forerunners=["other"])
    assert desk.asked == ["a"]


def test_a_target_that_kills_its_process_is_dead_in_the_end() -> None:
    desk = Desk(a=Outcome(False, reason="away"))
    desk.run()
    seen = desk.kept("a")
    assert desk.store.deliveries.change(seen, claim(seen, "dead run", NOW + 100))
    desk.seen.clear()
    desk.clock.now = NOW + GIVE_UP_SECONDS + 1
    assert desk.run() == {"a": DEAD}
    assert desk.asked == []


def test_by_name() -> None:
    desk = Desk(a=Outcome(True), b=Outcome(True))
    assert desk.run(names=["handler:a"]) == {"a": DELIVERED, "b": PENDING}
    assert desk.run(names=["b"]) == {"a": DELIVERED, "b": DELIVERED}


def test_all_again() -> None:
    desk = Desk(a=Outcome(True), b=Outcome(True))
    desk.run()
    ids = {each.id for each in desk.seen}
    desk.seen.clear()
    assert desk.run(Wanted.ALL) == {"a": DELIVERED, "b": DELIVERED}
    assert {each.id for each in desk.seen} == ids
    assert desk.asked == ["a", "b"]


def test_new_results_replace_what_was_still_to_be_given() -> None:
    desk = Desk(a=Outcome(False, reason="away"))
    desk.run()
    desk.store.batches.amend("batch_1", merged_version=2)
    desk.answers["a"] = Outcome(True)
    desk.run()
    old, new = desk.store.deliveries.of_batch("batch_1")
    assert (old.version, old.state, new.version, new.state) == (1, DEAD, 2, DELIVERED)
    assert "newer results" in (old.last_error or "")
    desk.seen.clear()
    desk.run(Wanted.ALL)
    assert [each.version for each in desk.seen] == [2]


def test_an_open_batch_has_nothing_to_deliver() -> None:
    desk = Desk()
    desk.store.batches.add(Batch("batch_2", "file-1", "/v1/embeddings", "24h", BatchStatus.IN_PROGRESS, NOW, NOW + 9))
    with pytest.raises(StateConflict, match="has not ended"):
        deliver_batch("batch_2", DeliveryPorts(desk.store, [desk], desk.clock), Wanted.DUE, run_id="run")


def test_nobody_to_tell_is_noted_without_a_run() -> None:
    desk = Desk()
    batch = desk.store.batches.get("batch_1")
    assert not close_untold(batch, desk.store)  # a handler may want its results
    assert close_untold(replace(batch, output_file_id=None), desk.store)
    assert desk.store.deliveries.due(NOW, 9) == []
    assert not close_untold(replace(batch, output_file_id=None), desk.store)


class TestReplay:
    @pytest.fixture
    def desk(self) -> Desk:
        desk = Desk(a=Outcome(False, reason="gone", is_final=True))
        desk.run()
        return desk

    def test_a_dead_one_is_due_at_once(self, desk: Desk) -> None:
        desk.clock.now += 500
        replay(desk.kept("a"), desk.store, desk.clock)
        assert desk.store.deliveries.due(NOW + 500, 9) == ["batch_1"]
        desk.answers["a"] = Outcome(True)
        assert desk.run() == {"a": DELIVERED}

    def test_not_while_an_attempt_is_under_way(self, desk: Desk) -> None:
        dead = desk.kept("a")
        held = claim(replay(dead, desk.store, desk.clock), "run 9", NOW + 60)
        assert desk.store.deliveries.change(desk.kept("a"), held)
        with pytest.raises(StateConflict, match="under way"):
            replay(held, desk.store, desk.clock)
        with pytest.raises(StateConflict, match="changed by somebody else"):
            replay(dead, desk.store, desk.clock)

    def test_not_of_a_batch_whose_data_has_gone(self, desk: Desk) -> None:
        desk.store.retention.purge("batch_1", NOW)
        with pytest.raises(StateConflict, match="has gone"):
            replay(desk.kept("a"), desk.store, desk.clock)
