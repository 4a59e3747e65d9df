"""A simulated vLLM server: real HTTP, real queueing, made-up answers that say so.

For tests of faults, for measuring our own cost without a model, and for a look at the product without an engine. Start
it with `python -m vllm_batch_dagster.adapters.simulated`; every answer carries `"system_fingerprint": "simulated"`.
"""

from vllm_batch_dagster.adapters.simulated.faults import Faults
from vllm_batch_dagster.adapters.simulated.process import (
    SimulatedProcess,
    import_path,
    set_faults,
    simulated_command,
)

__all__ = ["Faults", "SimulatedProcess", "import_path", "set_faults", "simulated_command"]
