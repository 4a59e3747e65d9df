"""The memory ladder: with which memory settings an engine is started, and with which ones after it failed. Pure.

In: a fault that was read from the engine's log, the rung that it happened at. Out: the rung to try next, or none. A
rung holds only what does not change an answer: shares, sizes of steps, CUDA graphs. Precision, quantisation and the
type of the KV cache are never touched, and a stated context length neither (engine report, section 7).
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from vllm_batch_dagster.core.start_faults import Cause, StartFault

# How far vLLM's own start-up check may be approached: other programs need some memory too.
_SPARE_GIB = 0.5
_HIGHEST_SHARE = 0.95
_DEFAULT_SHARE = 0.92
_LOWEST_SHARE, _SHARE_STEP = 0.5, 0.04
_FEWEST_SEQS = 8
_FEWEST_TOKENS = 2048

PROBE_SECONDS = 7 * 86400.0
"""How long a rung holds that was taken because our own work did not fit."""


@dataclass(frozen=True, slots=True)
class Rung:
    """Memory settings of one start, named as vLLM's arguments; 0 says nothing and leaves it to vLLM.

    `cpu_kvcache_gib` is VLLM_CPU_KVCACHE_SPACE. `max_model_len` is set only to keep the context of a batch that runs.
    """

    max_num_seqs: int
    max_num_batched_tokens: int = 0
    gpu_memory_utilization: float = 0.0
    cpu_kvcache_gib: int = 0
    enforce_eager: bool = False
    max_model_len: int = 0

    def describe(self, top: "Rung") -> str:
        """Return what differs from `top`, as vLLM arguments; "as configured" when nothing does."""
        changes = [
            f"{_SPELLINGS[name]} {value:g}" if not isinstance(value, bool) else _SPELLINGS[name]
            for name, value in self.changes(top).items()
        ]
        return ", ".join(changes) or "as configured"

    def changes(self, top: "Rung") -> Mapping[str, float]:
        """Return the fields that differ from `top`, in a fixed order."""
        return {name: getattr(self, name) for name in _SPELLINGS if getattr(self, name) != getattr(top, name)}


_SPELLINGS: Mapping[str, str] = {
    "max_num_seqs": "--max-num-seqs",
    "max_num_batched_tokens": "--max-num-batched-tokens",
    "gpu_memory_utilization": "--gpu-memory-utilization",
    "cpu_kvcache_gib": "VLLM_CPU_KVCACHE_SPACE",
    "enforce_eager": "--enforce-eager",
    "max_model_len": "--max-model-len",
}


@dataclass(frozen=True, slots=True)
class Room:
    """How far the ladder may go: the highest share of the device, the machine's free memory in GiB, and whether the
    size of a step must stay (a pooling model needs one that holds its longest input)."""

    highest_share: float
    host_free_gib: float
    keeps_tokens: bool = False


@dataclass(frozen=True, slots=True)
class Remembered:
    """The rung that worked, and why it was taken. `basis` stands for everything else that decides: arguments, driver,
    size of the memory. `since` in unix seconds. Not `is_proven`: it follows a death and has not started yet."""

    basis: str
    rung: Rung
    cause: Cause
    quote: str
    since: float
    is_proven: bool = True


def highest_share(configured: float, *, is_argument: bool) -> float:
    """Return the share up to which the ladder may go. Who lowered it, or wrote it as an argument, wants no more."""
    if is_argument or configured < _DEFAULT_SHARE:
        return configured
    return max(configured, _HIGHEST_SHARE)


def first_rung(
    remembered: Remembered | None, top: Rung, basis: str, *, now: float, free_share: float | None, host_free_gib: float
) -> Rung:
    """Return the rung that a start begins with: the remembered one, while it holds; else `top`.

    It is forgotten when the basis has changed. It is probed from the top again when the memory that somebody else held
    is free (`free_share` of the device, None when unknown), otherwise PROBE_SECONDS after it was found.
    """
    if remembered is None or remembered.basis != basis:
        return top
    if not remembered.is_proven:
        return remembered.rung
    if remembered.cause is Cause.FREE_MEMORY and free_share is not None:
        return top if free_share >= top.gpu_memory_utilization else remembered.rung
    if remembered.cause is Cause.KV_SPACE:
        return top if host_free_gib >= top.cpu_kvcache_gib + 2 * _SPARE_GIB else remembered.rung
    return top if now - remembered.since >= PROBE_SECONDS else remembered.rung


def next_rung(fault: StartFault, rung: Rung, room: Room, tried: Collection[Rung]) -> Rung | None:
    """Return what to try after `fault` at `rung`: the first answer to its cause that is new. None: no rung helps."""
    answers = _ANSWERS.get(fault.cause)
    if answers is None:
        return None
    return next((each for each in answers(fault, rung, room) if each != rung and each not in tried), None)


def narrow(room: Room, fault: StartFault, rung: Rung) -> Room:
    """Return the room that is left once a start has failed: nothing above the free share is tried again."""
    if fault.cause is Cause.FREE_MEMORY:
        return replace(room, highest_share=min(room.highest_share, _free_share(fault)))
    if fault.cause in (Cause.GRAPH_CAPTURE, Cause.OUT_OF_MEMORY):
        return replace(room, highest_share=min(room.highest_share, rung.gpu_memory_utilization or room.highest_share))
    return room


def _free_share(fault: StartFault) -> float:
    free, total = fault.numbers["free"], fault.numbers["total"]
    return math.floor(100 * (free - _SPARE_GIB) / total) / 100 if total > 0 else 0.0


def _to_free_memory(fault: StartFault, rung: Rung, _room: Room) -> Iterator[Rung]:
    share = _free_share(fault)
    if 0.05 <= share < fault.numbers["utilization"]:
        yield replace(rung, gpu_memory_utilization=share)


def _to_free_kv_space(fault: StartFault, rung: Rung, _room: Room) -> Iterator[Rung]:
    gib = math.floor(fault.numbers["free"] - _SPARE_GIB)
    if 1 <= gib < rung.cpu_kvcache_gib:
        yield replace(rung, cpu_kvcache_gib=gib)


def _more_for_kv(_fault: StartFault, rung: Rung, room: Room) -> Iterator[Rung]:
    if 0 < rung.gpu_memory_utilization < room.highest_share:
        yield replace(rung, gpu_memory_utilization=room.highest_share)
    yield _fewer_tokens(rung, room)
    yield replace(rung, enforce_eager=True)
    yield replace(_fewer_tokens(rung, room), enforce_eager=True)


def _larger_kv(fault: StartFault, rung: Rung, room: Room) -> Iterator[Rung]:
    if rung.cpu_kvcache_gib:
        gib = math.ceil(fault.numbers["needed"])
        if rung.cpu_kvcache_gib < gib <= room.host_free_gib - 2 * _SPARE_GIB:
            yield replace(rung, cpu_kvcache_gib=gib)
        return
    yield from _more_for_kv(fault, rung, room)


def _fewer_seqs(fault: StartFault, rung: Rung, _room: Room) -> Iterator[Rung]:
    blocks = int(fault.numbers.get("blocks", 0))
    if 1 <= blocks < rung.max_num_seqs:
        yield replace(rung, max_num_seqs=blocks)
    else:
        yield replace(rung, max_num_seqs=max(1, rung.max_num_seqs // 2))


def _smaller_graphs(_fault: StartFault, rung: Rung, _room: Room) -> Iterator[Rung]:
    """Graphs are worth some KV cache: an ample share gives them room once, then they are left out."""
    if rung.gpu_memory_utilization >= _DEFAULT_SHARE:
        yield replace(rung, gpu_memory_utilization=_lower_share(rung))
    yield replace(rung, enforce_eager=True)
    yield replace(rung, gpu_memory_utilization=_lower_share(rung), enforce_eager=True)


def _smaller_steps(fault: StartFault, rung: Rung, room: Room) -> Iterator[Rung]:
    yield _fewer_tokens(rung, room)
    yield from _fewer_seqs(fault, rung, room)


def _one_down(_fault: StartFault, rung: Rung, room: Room) -> Iterator[Rung]:
    """The ladder of the report: 0.92/256/8192, 0.88/128/4096, 0.84/64/2048, 0.80/32/2048 without CUDA graphs."""
    lower = _fewer_tokens(rung, room)
    yield replace(
        lower,
        gpu_memory_utilization=_lower_share(rung),
        max_num_seqs=max(min(_FEWEST_SEQS, rung.max_num_seqs), rung.max_num_seqs // 2),
        enforce_eager=rung.enforce_eager or lower == rung,
    )


def _less_host(fault: StartFault, rung: Rung, room: Room) -> Iterator[Rung]:
    if rung.cpu_kvcache_gib > 1:
        yield replace(rung, cpu_kvcache_gib=rung.cpu_kvcache_gib // 2)
    yield from _one_down(fault, rung, room)


def _fewer_tokens(rung: Rung, room: Room) -> Rung:
    if room.keeps_tokens or rung.max_num_batched_tokens <= _FEWEST_TOKENS:
        return rung
    tokens = max(_FEWEST_TOKENS, rung.max_num_batched_tokens // 2)
    # vLLM refuses a step that is smaller than the number of sequences.
    return replace(rung, max_num_batched_tokens=max(tokens, rung.max_num_seqs))


def _lower_share(rung: Rung) -> float:
    share = rung.gpu_memory_utilization
    return max(min(_LOWEST_SHARE, share), round(share - _SHARE_STEP, 2)) if share else share


_ANSWERS: Mapping[Cause, Callable[[StartFault, Rung, Room], Iterator[Rung]]] = {
    Cause.FREE_MEMORY: _to_free_memory,
    Cause.KV_SPACE: _to_free_kv_space,
    Cause.NO_KV_MEMORY: _more_for_kv,
    Cause.KV_TOO_SMALL: _larger_kv,
    Cause.SEQUENCES: _fewer_seqs,
    Cause.GRAPH_CAPTURE: _smaller_graphs,
    Cause.ACTIVATIONS: _smaller_steps,
    Cause.OUT_OF_MEMORY: _one_down,
    Cause.HOST_MEMORY: _less_host,
}
