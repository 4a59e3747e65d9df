"""Properties of the journal: damage costs only what it touches, a replay is the same every time, and a run that was
taken for dead cannot write into the result of the one that took over."""

import io
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.unit.conftest import Rig, answer, id_range, ids
from vllm_batch_dagster.adapters.memory import MemoryFiles
from vllm_batch_dagster.core.errors import CorruptJournal, StaleAttempt
from vllm_batch_dagster.core.journal import JournalRecord, damaged_places, encode_record, read_records
from vllm_batch_dagster.core.results import read_results
from vllm_batch_dagster.stages.attempts import ChunkAttempt
from vllm_batch_dagster.stages.journals import replay


def records(sizes: Sequence[int]) -> list[bytes]:
    """Encoded records of lines 0, 1, 2..., with bodies of about these sizes."""
    bodies = [msgspec.Raw(b'{"text":"' + b"x" * size + b'"}') for size in sizes]
    return [
        encode_record(JournalRecord(line, f"id-{line}", True, 200, "r", 0.1, 1, body))
        for line, body in enumerate(bodies)
    ]


def lines_of(data: bytes) -> list[int]:
    return [placed.record.line for placed in read_records(io.BytesIO(data))]


def costs(parts: Sequence[bytes], first: int, last: int) -> set[int]:
    """The lines that damage to bytes `first`..`last` may cost: those it touches, and the one behind a lost newline."""
    lost, start = set(), 0
    for line, part in enumerate(parts):
        if start <= last and first < start + len(part):
            lost |= {line} | ({line + 1} if last >= start + len(part) - 1 else set())
        start += len(part)
    return lost


SIZES = st.lists(st.integers(0, 300), min_size=1, max_size=8)


@given(SIZES, st.data())
def test_a_flipped_bit_anywhere_costs_the_records_it_touches_and_always_shows(
    sizes: list[int], data: st.DataObject
) -> None:
    parts = records(sizes)
    damaged = bytearray(b"".join(parts))
    place = data.draw(st.integers(0, len(damaged) - 1))
    damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    found, lost = lines_of(bytes(damaged)), costs(parts, place, place)
    assert set(range(len(parts))) - set(found) <= lost
    assert len(found) < len(parts)
    assert list(damaged_places(io.BytesIO(damaged)))
    assert found == sorted(found)


@given(SIZES, st.data(), st.sampled_from([b"\0", b"\xff", b"\n"]))
def test_a_stretch_of_any_byte_costs_the_records_it_touches(
    sizes: list[int], data: st.DataObject, filler: bytes
) -> None:
    parts = records(sizes)
    whole = b"".join(parts)
    first = data.draw(st.integers(0, len(whole) - 1))
    last = data.draw(st.integers(first, len(whole) - 1))
    damaged = whole[:first] + filler * (last + 1 - first) + whole[last + 1 :]
    lost = costs(parts, first, last) if damaged != whole else set()
    assert set(range(len(parts))) - set(lines_of(damaged)) <= lost


@given(SIZES, st.data())
@example([0], None)
def test_a_cut_costs_what_is_behind_it_and_is_no_damage(sizes: list[int], data: st.DataObject | None) -> None:
    parts = records(sizes)
    whole = b"".join(parts)
    cut = data.draw(st.integers(0, len(whole))) if data else len(whole) - 1
    kept = sum(1 for number in range(len(parts)) if sum(map(len, parts[: number + 1])) <= cut)
    assert lines_of(whole[:cut]) == list(range(kept))
    assert all(is_tail for _place, is_tail in damaged_places(io.BytesIO(whole[:cut])))


@given(st.integers(1, 0xFFFFFFFF))
def test_a_wrong_length_in_a_head_never_draws_more_than_a_record_into_memory(length: int) -> None:
    parts = records([100, 100, 100])
    reads: list[int] = []

    class Watched(io.BytesIO):
        def readline(self, size: int | None = -1, /) -> bytes:
            reads.append(len(line := super().readline(size)))
            return line

    journal = Watched(b"%08x" % length + parts[0][8:] + parts[1] + parts[2])
    found = [placed.record.line for placed in read_records(journal)]
    assert found[-2:] == [1, 2]
    assert max(reads) <= max(map(len, parts))


@pytest.fixture(scope="module")
def long_lived(tmp_path_factory: pytest.TempPathFactory) -> Rig:
    """One rig for all examples; each has a batch of its own."""
    rig = Rig(tmp_path_factory.mktemp("rig"))
    rig.files = MemoryFiles()
    return rig


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_interleaving_of_a_stale_attempt_and_its_successor_has_one_result(
    long_lived: Rig, data: st.DataObject
) -> None:
    """What the stale one had written when the other began counts; what it writes later never does."""
    rig, total = long_lived, data.draw(st.integers(1, 6), label="lines")
    batch_id = rig.start(total, chunk_size=10)
    stale = rig.begin(batch_id)
    old = list(stale.pending_lines())
    head_start = data.draw(st.integers(0, total), label="answered before")
    for line in old[:head_start]:
        answer(line)
    fresh = rig.begin(batch_id)
    new = list(fresh.pending_lines())
    assert [line.line for line in new] == list(range(head_start, total))
    later = old[head_start:]
    for turn in data.draw(st.permutations(["stale"] * len(later) + ["fresh"] * len(new)), label="order"):
        answer((later if turn == "stale" else new).pop(0))
        if data.draw(st.booleans()):
            with pytest.raises(StaleAttempt):
                stale.publish(reason="engine_failure")
    summary = fresh.publish()
    assert (summary.counts.completed, summary.replayed) == (total, head_start)
    stale.close()
    fresh.close()
    rig.merge(batch_id)
    rows = rig.output(batch_id)
    assert ids(rows) == id_range(total)
    assert [row["response"]["body"]["epoch"] for row in rows] == [1] * head_start + [2] * (total - head_start)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_replay_is_the_same_every_time_and_so_is_what_is_sealed(long_lived: Rig, data: st.DataObject) -> None:
    rig, total = long_lived, data.draw(st.integers(1, 6))
    batch_id = rig.start(total, chunk_size=10)
    attempt: ChunkAttempt | None = None
    for _ in range(data.draw(st.integers(1, 3), label="attempts")):
        attempt = rig.begin(batch_id)
        pending = list(attempt.pending_lines())
        for line in data.draw(st.permutations(pending))[: data.draw(st.integers(0, len(pending)))]:
            answer(line, ok=data.draw(st.booleans()))
        attempt.close()
    assert attempt is not None
    epoch = attempt.epoch
    told = [list(replay(rig.workspace, batch_id, 0, 1, epoch)) for _ in range(2)]
    assert told[0] == told[1]
    path = rig.workspace.result_path(batch_id, 0, epoch)
    first = attempt.publish(reason="engine_failure")
    packed = path.read_bytes()
    assert attempt.publish(reason="engine_failure") == first
    assert path.read_bytes() == packed
    again = rig.begin(batch_id)  # a later attempt that sends nothing finds the same answers
    again.close()
    assert again.publish(reason="engine_failure").digest == first.digest
    again_path = rig.workspace.result_path(batch_id, 0, epoch + 1)
    with path.open("rb") as one, again_path.open("rb") as other:
        assert read_results(one) == read_results(other)


def test_a_chunk_whose_answers_the_disk_has_lost_is_not_published(rig: Rig) -> None:
    batch_id = rig.start(3)
    attempt = rig.begin(batch_id)
    for line in attempt.pending_lines():
        answer(line)
    path = rig.workspace.journal_path(batch_id, 0, 1)
    content = bytearray(path.read_bytes())
    content[50] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptJournal, match="run the chunk again"):
        attempt.publish()
    attempt.close()
    assert not rig.store.chunks.get(batch_id, 0).is_published
    resumed = rig.begin(batch_id)
    assert [line.line for line in resumed.pending_lines()] == [0]
    resumed.close()
