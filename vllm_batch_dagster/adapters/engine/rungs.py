"""The ladder of one engine folder: which rung a start begins with, and which one comes after a failure or a death.

The rules are `core/ladder.py`'s. Here is what they need: the machine's memory, the engine's log, and `rungs.json`,
which remembers one rung per model and device. Deleting that file forgets them; one that cannot be read is as good as
none.
Blocking calls; the caller holds the start lock.
"""

import contextlib
import hashlib
import time
from dataclasses import dataclass, field, replace

import msgspec

from vllm_batch_dagster.adapters.engine.folder import EngineFolder, EngineRecord
from vllm_batch_dagster.adapters.engine.hardware import Hardware, look_at_hardware
from vllm_batch_dagster.adapters.engine.launch import Launch
from vllm_batch_dagster.adapters.engine.logtail import CLASSIFIED_LINES, read_tail
from vllm_batch_dagster.core.ladder import Remembered, Room, Rung, first_rung, narrow, next_rung
from vllm_batch_dagster.core.start_faults import Cause, StartFault, classify_log, find_memory_death


@dataclass(slots=True)
class Climb:
    """One request for an engine: the rungs that failed so far, and what is left to try. `tries` bounds them."""

    launch: Launch
    room: Room
    tries: int
    remembered: Remembered | None = None
    failed: list[tuple[Rung, StartFault]] = field(default_factory=list)

    def after(self, rung: Rung, fault: StartFault) -> Rung | None:
        """Return the rung to try after `fault` at `rung`; None when trying on is useless."""
        self.failed.append((rung, fault))
        if len(self.failed) >= self.tries:
            return None
        if fault.cause is Cause.PORT_TAKEN:
            return rung
        self.room = narrow(self.room, fault, rung)
        tried = [each for each, _ in self.failed]
        following = next_rung(fault, rung, self.room, tried)
        # The probe of a higher rung has failed: back to the one that is known to work.
        known = self.remembered.rung if self.remembered else None
        return known if following is not None and known is not None and known not in tried else following

    def reason_for(self, rung: Rung) -> StartFault | None:
        """Return the last failure of another rung; None when `rung` was not reached by one."""
        return next((fault for failed, fault in reversed(self.failed) if failed != rung), None)

    def describe(self) -> str:
        """Return what was tried, for the error."""
        return "; ".join(f"{rung.describe(self.launch.top)} ({fault.cause.value})" for rung, fault in self.failed)


class Ladder:
    """See the module."""

    def __init__(self, folder: EngineFolder, tries: int) -> None:
        self._folder = folder
        self._tries = tries

    def choose(self, launch: Launch, *, may_probe: bool) -> Rung:
        """Return the rung to start with. After a death (not `may_probe`) nothing higher is tried."""
        remembered = self._recall(launch)
        if remembered is None:
            return launch.top
        hardware = look_at_hardware(launch.device)
        basis = _basis(launch, hardware)
        if not may_probe and remembered.basis == basis:
            return remembered.rung
        return first_rung(
            remembered,
            launch.top,
            basis,
            now=time.time(),
            free_share=hardware.free_share,
            host_free_gib=hardware.host_free_gib,
        )

    def begin(self, launch: Launch) -> Climb:
        """Return the climb that follows a first failure."""
        hardware = look_at_hardware(launch.device)
        remembered = self._recall(launch)
        if remembered is not None and (remembered.basis != _basis(launch, hardware) or not remembered.is_proven):
            remembered = None
        room = Room(launch.highest_share, hardware.host_free_gib, launch.keeps_tokens)
        return Climb(launch, room, self._tries, remembered)

    def settle(self, launch: Launch, rung: Rung, fault: StartFault | None) -> None:
        """Note that `rung` works; `fault` is what the start before it died of, if one did."""
        known = self._recall(launch)
        if rung == launch.top:
            if known is not None:
                self._write(launch, None)
            return
        basis = _basis(launch, look_at_hardware(launch.device))
        if fault is not None:
            self._write(launch, Remembered(basis, rung, fault.cause, fault.quote, time.time()))
        elif known is not None and known.rung == rung and not known.is_proven:
            self._write(launch, replace(known, is_proven=True))

    def note_death(self, launch: Launch) -> None:
        """Look at what is left of the engine of `launch`: one that ran out of memory goes one rung down."""
        record = self._folder.read()
        if record is None or record.fingerprint != launch.fingerprint:
            return
        fault = self._find_fault(record)
        if fault is None:
            return
        hardware = look_at_hardware(launch.device)
        room = Room(launch.highest_share, hardware.host_free_gib, launch.keeps_tokens)
        rung = record.rung or launch.top
        following = next_rung(fault, rung, narrow(room, fault, rung), [rung])
        if following is None:
            return
        if record.is_ready and not launch.states_context:
            # What it accepted it will accept: a batch must not find its context shorter in the middle.
            following = replace(following, max_model_len=record.max_model_len)
        basis = _basis(launch, hardware)
        self._write(launch, Remembered(basis, following, fault.cause, fault.quote, time.time(), is_proven=False))

    def _find_fault(self, record: EngineRecord) -> StartFault | None:
        if record.is_ready:
            return find_memory_death(read_tail(self._folder.log, record.served_from, CLASSIFIED_LINES))
        if record.is_alive:
            return None
        return classify_log(read_tail(self._folder.log, record.log_offset, CLASSIFIED_LINES))

    def _recall(self, launch: Launch) -> Remembered | None:
        return self._read().get(_key(launch))

    def _read(self) -> dict[str, Remembered]:
        try:
            return msgspec.json.decode(self._folder.rungs.read_bytes(), type=dict[str, Remembered])
        except (OSError, msgspec.DecodeError):
            return {}

    def _write(self, launch: Launch, remembered: Remembered | None) -> None:
        """A disk that refuses costs a later start its shortcut, and must not cost this one its engine."""
        rungs = self._read()
        rungs.pop(_key(launch), None)
        if remembered is not None:
            rungs[_key(launch)] = remembered
        with contextlib.suppress(OSError):
            self._folder.replace_file(self._folder.rungs, msgspec.json.encode(rungs))


def _key(launch: Launch) -> str:
    return f"{launch.model.name} on {launch.device}"


def _basis(launch: Launch, hardware: Hardware) -> str:
    return hashlib.sha256(f"{launch.fingerprint} {hardware.identity}".encode()).hexdigest()
