"""The schedule of the curation, evaluated as the daemon does it."""

from datetime import UTC, datetime

import dagster as dg

from tests.defs.graph import Graph

AT = datetime(2026, 11, 26, 12, 43, tzinfo=UTC)


def ask_schedule(graph: Graph) -> list[str] | str:
    """Return the batches that the schedule asks for, or why it asks for none."""
    schedule = graph.definitions.resolve_schedule_def("curate_schedule")
    context = dg.build_schedule_context(
        instance=graph.instance, scheduled_execution_time=AT, resources={"services": graph.services}
    )
    told = schedule(context)
    if isinstance(told, dg.SkipReason):
        return str(told.skip_message)
    assert isinstance(told, list)
    return [str(request.partition_key) for request in told]
