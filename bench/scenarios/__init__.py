"""The scenarios. `SCENARIOS` maps each name to the function that measures it; two names may share one measurement."""

from collections.abc import Callable, Mapping, Sequence

from bench.figures import Result
from bench.plan import Plan
from bench.scenarios.code_location import measure_import
from bench.scenarios.cold_and_warm import measure_cold_and_warm
from bench.scenarios.latency import measure_latency
from bench.scenarios.memory import measure_memory
from bench.scenarios.orchestration import measure_orchestration
from bench.scenarios.overhead import measure_overhead

Measure = Callable[[Plan], Sequence[Result]]

SCENARIOS: Mapping[str, Measure] = {
    "cold": measure_cold_and_warm,
    "warm": measure_cold_and_warm,
    "latency": measure_latency,
    "orchestration": measure_orchestration,
    "overhead": measure_overhead,
    "memory": measure_memory,
    "import": measure_import,
}
