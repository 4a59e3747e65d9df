"""In-memory twins of the adapters: the same behaviour without disk, network or engine. Nothing outlives the process.

They pass the contract tests of the real ones (tests/contract), so that what runs on them runs on those.
"""

from vllm_batch_dagster.adapters.memory.catalog import MemoryCatalog
from vllm_batch_dagster.adapters.memory.clock import FixedClock
from vllm_batch_dagster.adapters.memory.engine import EchoEngine, EchoLease, Faults
from vllm_batch_dagster.adapters.memory.files import MemoryFiles
from vllm_batch_dagster.adapters.memory.review_board import MemoryBoard
from vllm_batch_dagster.adapters.memory.store import MemoryStore

__all__ = [
    "EchoEngine",
    "EchoLease",
    "Faults",
    "FixedClock",
    "MemoryBoard",
    "MemoryCatalog",
    "MemoryFiles",
    "MemoryStore",
]
