"""The scenarios. `SCENARIOS` maps each name to the function that measures it; two names may share one measurement."""

from collections.abc import Callable, Mapping, Sequence

from bench.figures import Result
from bench.plan import Plan
from bench.scenarios.code_location import measure_import
from bench.scenarios.cold_and_warm import measure_cold_and_warm
from bench.scenarios.journal import measure_journal
from bench.scenarios.kills import measure_kills, measure_kills_real
from bench.scenarios.latency import measure_latency
from bench.scenarios.memory import measure_memory
from bench.scenarios.million import measure_million
from bench.scenarios.orchestration import measure_orchestration
from bench.scenarios.overhead import measure_overhead
from bench.scenarios.polling import measure_polling
from bench.scenarios.recovery import measure_recovery
from bench.scenarios.upload import measure_upload
from bench.scenarios.validation import measure_validation

Measure = Callable[[Plan], Sequence[Result]]

SCENARIOS: Mapping[str, Measure] = {
    "cold": measure_cold_and_warm,
    "warm": measure_cold_and_warm,
    "latency": measure_latency,
    "orchestration": measure_orchestration,
    "overhead": measure_overhead,
    "memory": measure_memory,
    "recovery": measure_recovery,
    "import": measure_import,
    "validation": measure_validation,
    "upload": measure_upload,
    "polling": measure_polling,
    "journal": measure_journal,
    "million": measure_million,
    "kills": measure_kills,
    "kills-real": measure_kills_real,
}

# Of the others, what a call without names measures; these take long, or say little about a user's machine.
ONLY_BY_NAME = frozenset(("journal", "million", "kills", "kills-real"))
