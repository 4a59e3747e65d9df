"""The `deliveries` asset: the event and the results of an ended batch in the hands of webhooks and handlers.

One run serves every target of a batch whose time has come. What came of each is kept in the batch store, which also
says when it is tried again; here it is shown, and can be asked for again. A target that fails makes a check fail, not
the run, and never changes the batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import dagster as dg
from pydantic import Field

from handlers.courier import HandlerCourier
from vllm_batch_dagster.composition import build_handler_courier
from vllm_batch_dagster.core.deliveries import HANDLER, WEBHOOK, DeliveryRecord, DeliveryState, Wanted
from vllm_batch_dagster.defs import checks
from vllm_batch_dagster.defs.history import forerunners, is_by_hand
from vllm_batch_dagster.defs.partitions import batches
from vllm_batch_dagster.defs.services import Services
from vllm_batch_dagster.stages.deliveries import deliver_batch

DELIVERIES = dg.AssetKey("deliveries")
# Before curated_export in the run of a merge: a webhook should be told at once.
_FIRST = {"dagster/priority": "1"}
_CHECKS = {HANDLER: checks.HANDLERS_DELIVERED, WEBHOOK: checks.WEBHOOKS_DELIVERED}


class DeliveryConfig(dg.Config):
    """What a person may ask for in the launchpad."""

    again: bool = Field(default=False, description="Deliver also what is delivered already, under the same ids.")
    targets: list[str] = Field(
        default=[], description="Only these: handler:<name>, webhook:<endpoint id>, webhook:metadata. Empty: all."
    )


def deliveries() -> dg.AssetsDefinition:
    @dg.asset(
        name="deliveries",
        partitions_def=batches,
        deps=["merged_output"],
        group_name="batch",
        kinds={"python"},
        op_tags=_FIRST,
        check_specs=checks.delivery_check_specs(batches),
    )
    def deliver(
        context: dg.AssetExecutionContext, config: DeliveryConfig, services: dg.ResourceParam[Services]
    ) -> Iterator[object]:
        """The end of a batch told to its webhooks, its results given to each handler. A run by hand tries everything
        that is not delivered; with `again` in the launchpad, everything."""
        handlers = build_handler_courier(services.settings, services.files)
        before = {each.id: each for each in services.store.deliveries.of_batch(context.partition_key)}
        after = deliver_batch(
            context.partition_key,
            services.delivery_ports(handlers),
            _wanted(context.run, config),
            run_id=context.run.run_id,
            forerunners=forerunners(context.instance, context.run),
            names=config.targets,
            report=context.log.info,
        )
        for each in after:
            if before.get(each.id) != each:
                context.log_event(_observe(each))
        yield dg.MaterializeResult(
            metadata=_describe(after, handlers),
            check_results=[checks.deliveries_check(spec, _of_kind(after, kind)) for kind, spec in _CHECKS.items()],
        )

    return deliver


def _wanted(run: dg.DagsterRun, config: DeliveryConfig) -> Wanted:
    if config.again:
        return Wanted.ALL
    return Wanted.UNDELIVERED if is_by_hand(run) else Wanted.DUE


def _of_kind(shown: Sequence[DeliveryRecord], kind: str) -> list[DeliveryRecord]:
    return [each for each in shown if each.kind == kind]


def _observe(delivery: DeliveryRecord) -> dg.AssetObservation:
    """Return what the history of the partition shows of one target after this run."""
    return dg.AssetObservation(
        DELIVERIES,
        partition=delivery.batch_id,
        description=f"{delivery.target}: {delivery.state.value}",
        metadata={name: value for name, value in _row(delivery).items() if value is not None},
    )


def _describe(shown: Sequence[DeliveryRecord], handlers: HandlerCourier) -> Mapping[str, dg.MetadataValue[Any]]:
    counts = {state.value: dg.MetadataValue.int(sum(each.state is state for each in shown)) for state in DeliveryState}
    records = [dg.TableRecord({name: value or "" for name, value in _row(each).items()}) for each in shown]
    return {
        **counts,
        "targets": dg.MetadataValue.table(records, schema=_SCHEMA),
        "unused_handlers": dg.MetadataValue.json(handlers.unused()),
    }


def _row(delivery: DeliveryRecord) -> dict[str, str | int | None]:
    is_pending = delivery.state is DeliveryState.PENDING
    return {
        "target": delivery.target,
        "state": delivery.state.value,
        "attempts": delivery.attempts,
        "next_attempt": _moment(delivery.next_attempt_at) if is_pending else None,
        "delivered": _moment(delivery.delivered_at) if delivery.delivered_at is not None else None,
        "last_error": delivery.last_error,
        "delivery_id": delivery.id,
        "results_version": delivery.version,
    }


def _moment(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


_SCHEMA = dg.TableSchema(
    [
        dg.TableColumn("target", "string"),
        dg.TableColumn("state", "string"),
        dg.TableColumn("attempts", "int"),
        dg.TableColumn("next_attempt", "string"),
        dg.TableColumn("delivered", "string"),
        dg.TableColumn("last_error", "string"),
        dg.TableColumn("delivery_id", "string"),
        dg.TableColumn("results_version", "int"),
    ]
)
