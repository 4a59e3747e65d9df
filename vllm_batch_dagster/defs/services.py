"""The adapters as one Dagster resource. Everything is built on first use, so that loading the graph opens nothing."""

import secrets
import time
from functools import cached_property

from vllm_batch_dagster.composition import (
    build_catalog,
    build_engines,
    build_files,
    build_model_facts,
    build_pauses,
    build_provenance,
    build_store,
    build_webhook_sender,
    build_workspace,
)
from vllm_batch_dagster.core.creation import new_file_id
from vllm_batch_dagster.core.errors import ConfigurationError
from vllm_batch_dagster.core.models import Batch, Chunk, Model
from vllm_batch_dagster.core.pauses import configuration_mark
from vllm_batch_dagster.core.ports import BatchStore, EngineManager, FileStore, ModelCatalog, Workspace
from vllm_batch_dagster.core.preflight import ModelFacts
from vllm_batch_dagster.core.provenance import Provenance
from vllm_batch_dagster.core.retry import RetryPolicy
from vllm_batch_dagster.settings import Settings
from vllm_batch_dagster.stages.deliveries import Courier, DeliveryPorts
from vllm_batch_dagster.stages.inference import InferencePolicy, InferencePorts
from vllm_batch_dagster.stages.merging import MergePorts
from vllm_batch_dagster.stages.origins import OriginNotes
from vllm_batch_dagster.stages.pausing import PauseBoard, PausePolicy
from vllm_batch_dagster.stages.validation import ValidationLimits
from vllm_batch_dagster.stages.webhook_courier import WebhookCourier
from vllm_batch_dagster.stages.webhooks import WebhookPorts

_ENGINE_SETTINGS = (
    "engine_url",
    "engine_api_key",
    "engine_python",
    "engine_device",
    "engine_args",
    "engine_start_seconds",
    "engine_start_tries",
    "gpu_memory_utilization",
    "cpu_kvcache_gib",
    "max_num_seqs",
    "max_num_batched_tokens",
)


class Services:
    """What the assets and sensors use. One per process; see composition.py for the choice of adapters."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @cached_property
    def store(self) -> BatchStore:
        return build_store(self.settings)

    @cached_property
    def files(self) -> FileStore:
        return build_files(self.settings)

    @cached_property
    def pauses(self) -> PauseBoard:
        return build_pauses(self.settings, self.store, self.clock, with_gpus=True)

    @cached_property
    def workspace(self) -> Workspace:
        return build_workspace(self.settings)

    @cached_property
    def engines(self) -> EngineManager:
        return build_engines(self.settings)

    @cached_property
    def facts(self) -> ModelFacts:
        return build_model_facts(self.settings)

    @cached_property
    def provenance(self) -> Provenance:
        return build_provenance(self.settings)

    @property
    def catalog(self) -> ModelCatalog:
        """Read anew each time: the operator may have added a model."""
        return build_catalog(self.settings)

    def clock(self) -> float:
        return time.time()

    def model_of(self, batch: Batch, chunk: Chunk | None = None) -> Model:
        """Return the catalogue entry for a chunk of a validated batch, or for all of a batch with one model.

        Raises ConfigurationError when it is gone.
        """
        name = (chunk and chunk.range.model) or batch.model
        model = self.catalog.find(name or "")
        if model is None:
            raise ConfigurationError(
                f"the model {name!r} of {batch.id} is no longer in the catalogue "
                f"{self.settings.catalogue_path}: put it back, then run the chunk again"
            )
        return model

    @property
    def limits(self) -> ValidationLimits:
        settings = self.settings
        return ValidationLimits(
            chunk_size=settings.chunk_size,
            chunk_slots=settings.chunk_slots,
            max_requests=settings.max_requests_per_batch,
            max_errors=settings.max_validation_errors,
            max_queued_lines=settings.max_queued_lines,
            mode=settings.validation_mode,
        )

    @property
    def inference_policy(self) -> InferencePolicy:
        settings = self.settings
        return InferencePolicy(
            retry=RetryPolicy(line_attempts=settings.max_line_attempts),
            chunk_attempts=settings.max_chunk_attempts,
            commit_seconds=settings.journal_commit_seconds,
            commit_records=settings.journal_commit_records,
            pauses=PausePolicy(engine=self.engine_configuration),
        )

    @property
    def inference_ports(self) -> InferencePorts:
        return InferencePorts(self.store, self.files, self.workspace, self.engines, self.clock, pauses=self.pauses)

    def origin_notes(self, model: Model) -> OriginNotes:
        """Return the notes of one run over chunks for `model`."""
        return OriginNotes(self.workspace, lambda: self.provenance.describe(model))

    def delivery_ports(self, handlers: Courier) -> DeliveryPorts:
        """Return the ports of `deliver_batch`, with webhooks beside the `handlers`."""
        webhooks = WebhookPorts(self.store, build_webhook_sender(self.settings), self.clock, secrets.token_bytes)
        return DeliveryPorts(self.store, [WebhookCourier(webhooks), handlers], self.clock)

    @property
    def engine_configuration(self) -> str:
        """What an engine that could not be had was started with, but for its model."""
        shown = self.settings.model_dump(include=set(_ENGINE_SETTINGS))
        return repr(sorted(shown.items()))

    def configuration_of(self, name: str) -> str:
        """Return the mark of a model's present configuration; see core/pauses.py."""
        return configuration_mark(self.catalog.find(name), self.engine_configuration)

    @property
    def merge_ports(self) -> MergePorts:
        return MergePorts(self.store, self.files, self.workspace, self.clock, lambda: new_file_id(secrets.token_bytes))

    @property
    def api_url(self) -> str:
        return self.settings.api_url
