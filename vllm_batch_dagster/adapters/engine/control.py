"""The engine from outside, for `vllm-batch up|down|status|doctor`: what runs, and make it stop. Blocking calls."""

import http.client
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vllm_batch_dagster.adapters.engine.folder import EngineFolder, EngineRecord
from vllm_batch_dagster.adapters.engine.launch import DRAIN_SECONDS
from vllm_batch_dagster.adapters.engine.locks import hold_within, try_hold
from vllm_batch_dagster.adapters.engine.loopback import HOST

AS_CONFIGURED = "as configured"

_LOCK_SECONDS = 5.0
_HEALTH_SECONDS = 2.0
_START_GRACE_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """A living engine. Times are unix seconds; `in_use` says that a run holds it. `rung` is what the memory ladder
    changed of its settings, "as configured" for nothing; `max_model_len` its context in tokens, 0 while it starts."""

    model: str
    pid: int
    url: str
    state: Literal["starting", "ready", "not answering"]
    in_use: bool
    max_num_seqs: int
    started_at: float
    last_used: float
    log: Path
    command: tuple[str, ...]
    rung: str
    max_model_len: int


def engine_status(folder: Path) -> EngineStatus | None:
    """Return what runs in the engine folder, None when nothing does. Takes at most 2 s."""
    files = EngineFolder(folder)
    record = files.read()
    if record is None or not record.is_alive:
        return None
    return EngineStatus(
        model=record.model,
        pid=record.pid,
        url=record.url,
        state=_state(record),
        in_use=_in_use(files),
        max_num_seqs=record.max_num_seqs,
        started_at=record.started_at,
        last_used=files.last_used(),
        log=files.log,
        command=record.command,
        rung=record.rung_words or AS_CONFIGURED,
        max_model_len=record.max_model_len,
    )


def engine_rung(folder: Path) -> str:
    """Return what the memory ladder changed of the engine that ran last; AS_CONFIGURED for nothing, empty when none
    ran. Asks nobody."""
    record = EngineFolder(folder).read()
    return "" if record is None else record.rung_words or AS_CONFIGURED


def stop_engine(folder: Path) -> str | None:
    """Stop the engine of `folder` with all its processes, recorded or not, whoever uses it. Returns its model.

    Idle vLLM needs 3 s; one with work gets 30 s to finish it and is killed then. Stop the runs first: one that still
    holds the engine starts it again.
    """
    files = EngineFolder(folder)
    if not files.root.is_dir():
        return None
    with hold_within(files.start_lock, _LOCK_SECONDS) as is_held:
        model = files.end_engine(_grace(files.read()))
    if not is_held:
        # Somebody was starting it: with its process gone they let go of the lock, and may have begun anew.
        with hold_within(files.start_lock, _LOCK_SECONDS):
            model = files.end_engine(_START_GRACE_SECONDS) or model
    return model


def _grace(record: EngineRecord | None) -> float:
    return DRAIN_SECONDS if record is not None and record.is_ready else _START_GRACE_SECONDS


def _state(record: EngineRecord) -> Literal["starting", "ready", "not answering"]:
    if _is_healthy(record.port):
        return "ready"
    return "not answering" if record.is_ready else "starting"


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=_HEALTH_SECONDS)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _in_use(files: EngineFolder) -> bool:
    probe = try_hold(files.use_lock, exclusive=True)
    if probe is None:
        return True
    probe.release()
    return False
