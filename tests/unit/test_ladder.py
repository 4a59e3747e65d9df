"""The memory ladder: what each fault is answered with, and how long a rung holds."""

from collections.abc import Mapping
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_batch_dagster.core.ladder import (
    PROBE_SECONDS,
    Remembered,
    Room,
    Rung,
    first_rung,
    highest_share,
    narrow,
    next_rung,
)
from vllm_batch_dagster.core.start_faults import Cause, StartFault

TOP = Rung(256, 8192, 0.92)
CPU = Rung(128, cpu_kvcache_gib=2, enforce_eager=True)
ROOM = Room(0.95, 16.0)
FREE = StartFault(Cause.FREE_MEMORY, numbers={"free": 11.39, "total": 15.57, "utilization": 0.92, "wanted": 14.33})
KV = StartFault(Cause.KV_TOO_SMALL, numbers={"length": 32768, "needed": 4.0, "available": 2.41, "estimated": 19728})
NUMBERS = {**FREE.numbers, **KV.numbers, "blocks": 97.0, "sequences": 256.0}


def climb(cause: Cause, rung: Rung, numbers: Mapping[str, float] | None = None, room: Room = ROOM) -> list[Rung]:
    """Every rung that follows when each one fails for the same cause."""
    fault, seen = StartFault(cause, numbers=numbers or {}), [rung]
    while (following := next_rung(fault, seen[-1], room, seen)) is not None:
        seen.append(following)
    return seen[1:]


def test_a_spike_goes_down_the_ladder_of_the_report() -> None:
    assert climb(Cause.OUT_OF_MEMORY, TOP)[:3] == [
        Rung(128, 4096, 0.88),
        Rung(64, 2048, 0.84),
        Rung(32, 2048, 0.8, enforce_eager=True),
    ]


def test_the_ladder_ends() -> None:
    bottom = climb(Cause.OUT_OF_MEMORY, TOP)[-1]
    assert (bottom.max_num_seqs, bottom.max_num_batched_tokens, bottom.gpu_memory_utilization) == (8, 2048, 0.5)


def test_memory_that_others_hold_is_left_to_them() -> None:
    assert climb(Cause.FREE_MEMORY, TOP, FREE.numbers) == [replace(TOP, gpu_memory_utilization=0.69)]
    assert climb(Cause.FREE_MEMORY, TOP, {**FREE.numbers, "free": 1.0}) == []


def test_a_cpu_that_has_less_than_its_cache_gets_a_smaller_one() -> None:
    numbers = {"free": 2.71, "total": 23.46, "wanted": 4.0}
    assert climb(Cause.KV_SPACE, replace(CPU, cpu_kvcache_gib=4), numbers) == [CPU]
    assert climb(Cause.KV_SPACE, CPU, numbers) == []


def test_no_memory_for_the_cache_takes_more_of_the_device_first() -> None:
    assert climb(Cause.NO_KV_MEMORY, TOP)[:3] == [
        replace(TOP, gpu_memory_utilization=0.95),
        replace(TOP, gpu_memory_utilization=0.95, max_num_batched_tokens=4096),
        replace(TOP, gpu_memory_utilization=0.95, max_num_batched_tokens=2048),
    ]


def test_what_others_hold_is_not_asked_for_again() -> None:
    lower = replace(TOP, gpu_memory_utilization=0.69)
    room = narrow(ROOM, FREE, TOP)
    answer = next_rung(StartFault(Cause.NO_KV_MEMORY), lower, room, [TOP, lower])
    assert answer == replace(lower, max_num_batched_tokens=4096)


def test_a_cache_for_one_request_grows_on_a_cpu_where_the_machine_has_room() -> None:
    assert climb(Cause.KV_TOO_SMALL, CPU, KV.numbers) == [replace(CPU, cpu_kvcache_gib=4)]
    assert climb(Cause.KV_TOO_SMALL, CPU, KV.numbers, Room(0.92, 4.5)) == []


def test_too_many_sequences() -> None:
    assert climb(Cause.SEQUENCES, TOP, {"sequences": 256})[0] == replace(TOP, max_num_seqs=128)
    assert climb(Cause.SEQUENCES, TOP, {"sequences": 256, "blocks": 97})[0] == replace(TOP, max_num_seqs=97)


def test_graphs_get_more_room_and_are_then_left_out() -> None:
    lower = replace(TOP, gpu_memory_utilization=0.88)
    assert climb(Cause.GRAPH_CAPTURE, TOP)[:2] == [lower, replace(lower, enforce_eager=True)]


def test_a_pooling_model_keeps_the_size_of_its_step() -> None:
    room = replace(ROOM, keeps_tokens=True)
    assert climb(Cause.ACTIVATIONS, TOP, room=room)[0] == replace(TOP, max_num_seqs=128)
    assert {rung.max_num_batched_tokens for rung in climb(Cause.OUT_OF_MEMORY, TOP, room=room)} == {8192}


@pytest.mark.parametrize(
    "cause", [Cause.WEIGHTS, Cause.MODEL_GATED, Cause.ARGUMENT, Cause.UNKNOWN, Cause.PORT_TAKEN, Cause.TOO_SLOW]
)
def test_what_memory_settings_cannot_mend_has_no_rung(cause: Cause) -> None:
    assert next_rung(StartFault(cause), TOP, ROOM, [TOP]) is None


rungs = st.builds(
    Rung,
    max_num_seqs=st.integers(1, 4096),
    max_num_batched_tokens=st.sampled_from([0, 512, 2048, 8192, 16384]),
    gpu_memory_utilization=st.sampled_from([0.0, 0.3, 0.5, 0.85, 0.92, 0.99]),
    cpu_kvcache_gib=st.integers(0, 64),
    enforce_eager=st.booleans(),
    max_model_len=st.sampled_from([0, 4096]),
)


@given(st.lists(st.sampled_from(list(Cause)), min_size=1, max_size=40), rungs)
def test_a_climb_never_repeats_itself_and_never_touches_what_it_accepts(causes: list[Cause], top: Rung) -> None:
    room, tried = ROOM, [top]
    for cause in causes:
        fault = StartFault(cause, numbers=NUMBERS)
        room = narrow(room, fault, tried[-1])
        following = next_rung(fault, tried[-1], room, tried)
        if following is None:
            continue
        assert following not in tried
        assert following.max_num_seqs in range(1, top.max_num_seqs + 1)
        assert following.max_num_batched_tokens <= max(top.max_num_batched_tokens, top.max_num_seqs)
        assert following.enforce_eager >= top.enforce_eager
        assert following.max_model_len == top.max_model_len
        assert 0 <= following.gpu_memory_utilization <= max(0.95, top.gpu_memory_utilization)
        assert following.gpu_memory_utilization == 0 or top.gpu_memory_utilization or Cause.FREE_MEMORY in causes
        tried.append(following)


def test_a_rung_knows_nothing_that_changes_an_answer() -> None:
    assert {field.name for field in fields(Rung)} == {
        *("max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization", "cpu_kvcache_gib"),
        *("enforce_eager", "max_model_len"),
    }


def test_who_lowered_the_share_is_not_overruled() -> None:
    assert highest_share(0.92, is_argument=False) == 0.95
    assert highest_share(0.97, is_argument=False) == 0.97
    assert highest_share(0.5, is_argument=False) == 0.5
    assert highest_share(0.92, is_argument=True) == 0.92


LOWER = replace(TOP, max_num_seqs=128)


def begin(known: Remembered | None, *, age: float = 0.0, free: float | None = None, basis: str = "same") -> Rung:
    return first_rung(known, TOP, basis, now=1000.0 + age, free_share=free, host_free_gib=8.0)


def test_a_rung_that_worked_is_where_the_next_start_begins() -> None:
    known = Remembered("same", LOWER, Cause.SEQUENCES, "", 1000.0)
    assert begin(None) == TOP
    assert begin(known) == LOWER
    assert begin(known, basis="another driver") == TOP


def test_a_rung_is_probed_after_a_week() -> None:
    known = Remembered("same", LOWER, Cause.OUT_OF_MEMORY, "", 1000.0)
    assert begin(known, age=PROBE_SECONDS - 1) == LOWER
    assert begin(known, age=PROBE_SECONDS) == TOP
    assert begin(replace(known, is_proven=False), age=PROBE_SECONDS) == LOWER, "not one that has yet to show itself"


def test_memory_that_others_held_is_taken_back_when_it_is_free() -> None:
    known = Remembered("same", replace(TOP, gpu_memory_utilization=0.69), Cause.FREE_MEMORY, "", 1000.0)
    assert begin(known, free=0.8).gpu_memory_utilization == 0.69
    assert begin(known, free=0.8, age=PROBE_SECONDS).gpu_memory_utilization == 0.69
    assert begin(known, free=0.93) == TOP
    assert begin(known, free=None) == known.rung, "a card that does not say"
    assert begin(known, free=None, age=PROBE_SECONDS) == TOP


def test_a_cache_that_the_machine_has_room_for_again_is_taken_back() -> None:
    known = Remembered("same", replace(CPU, cpu_kvcache_gib=1), Cause.KV_SPACE, "", 1000.0)
    for free, rung in ((2.9, known.rung), (3.0, CPU)):
        assert first_rung(known, CPU, "same", now=2000.0, free_share=None, host_free_gib=free) == rung


def test_a_rung_is_described_by_what_it_changes() -> None:
    assert TOP.describe(TOP) == "as configured"
    assert Rung(32, 2048, 0.8, enforce_eager=True).describe(TOP) == (
        "--max-num-seqs 32, --max-num-batched-tokens 2048, --gpu-memory-utilization 0.8, --enforce-eager"
    )
