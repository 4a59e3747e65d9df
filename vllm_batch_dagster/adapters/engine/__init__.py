"""The engine port over HTTP: our own vLLM server (`manage_engine`) or those of somebody else (`connect_engines`).

In: a model and request lines from the infer stage. Out: the engine's answers, byte for byte. The front doors use
`stop_engine` and `engine_status`. Facts and rules behind all of it: the vLLM engine report, decisions D1-D15.
"""

from vllm_batch_dagster.adapters.engine.control import (
    AS_CONFIGURED,
    EngineStatus,
    engine_rung,
    engine_status,
    stop_engine,
)
from vllm_batch_dagster.adapters.engine.manager import manage_engine
from vllm_batch_dagster.adapters.engine.remote import connect_engines

__all__ = [
    "AS_CONFIGURED",
    "EngineStatus",
    "connect_engines",
    "engine_rung",
    "engine_status",
    "manage_engine",
    "stop_engine",
]
