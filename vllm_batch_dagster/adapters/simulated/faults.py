"""Failures that the simulated engine can be told to have, by SIMULATED_FAULTS or `POST /faults`, as a JSON object.

What each looks like from outside was measured on vLLM 0.32 (engine report 5.2).
"""

import msgspec

VARIABLE = "SIMULATED_FAULTS"


class Faults(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """Counters count down; 0 is off. `*_after` counts the requests that are still answered first."""

    die_after: int | None = None
    """Then the process is gone as by SIGKILL: connections break."""
    core_dies_after: int | None = None
    """Then everything in flight gets a 500 that names EngineCore, and the process ends with code 0."""
    exit_after: int | None = None
    """Then the process ends by itself with `exit_code`: connections break."""
    exit_code: int = 0
    out_of_memory_after: int | None = None
    """As `core_dies_after`, after a line in the log as PyTorch writes it when a GPU's memory is full."""
    hang_after: int | None = None
    """Then nothing is answered any more, but /health says yes and the token counters stand still."""
    hang_without_health: bool = False
    """With `hang_after`: connections to /health are accepted and never answered."""
    prefill_next: int = 0
    """Requests that are read for `prefill_seconds`: the KV cache fills, and no token counter moves."""
    prefill_seconds: float = 0.0
    fail_next: int = 0
    """Answers that are a 500 of the request's own."""
    is_sick: bool = False
    """Every answer is a 500 of the request's own, and /health says yes."""
    busy_next: int = 0
    """Answers that are a 503."""
    abort_next: int = 0
    """Answers that are a 200 with half a text and `finish_reason: abort`."""
    cut_next: int = 0
    """Answers whose connection breaks in the middle of the body."""
    poison: str = ""
    """A request whose body contains this text kills the process."""
    hang_on: str = ""
    """A request whose body contains this text wedges the engine, as `hang_after` does."""
    start_says: str = ""
    """At the start the process writes this into its log and ends with code 1, unless a memory setting is at or below
    `start_needs`. The log texts of vLLM and PyTorch are in `start_logs`; any other text is written as it is."""
    start_needs: dict[str, float] = {}
    """Settings with which it starts nevertheless: `gpu_memory_utilization`, `max_num_seqs`, `max_num_batched_tokens` at
    most this; `enforce_eager` 1; `cpu_kvcache_gib`, `raised_utilization` at least this. All must hold."""

    def take(self, name: str) -> bool:
        """Use one of a counter up; False when it was 0."""
        left = getattr(self, name)
        if left <= 0:
            return False
        setattr(self, name, left - 1)
        return True

    def is_due(self, name: str, answered: int) -> bool:
        """True when `answered` requests have gone by and the fault begins."""
        after = getattr(self, name)
        return after is not None and answered >= after


def read_faults(text: str | bytes) -> Faults:
    """Raises msgspec.ValidationError, which names an unknown fault."""
    return msgspec.json.decode(text or b"{}", type=Faults)
