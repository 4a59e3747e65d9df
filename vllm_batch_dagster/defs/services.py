"""The adapters as one Dagster resource. Everything is built on first use, so that loading the graph opens nothing."""

import secrets
import time
from functools import cached_property

from vllm_batch_dagster.composition import (
    build_catalog,
    build_engines,
    build_files,
    build_model_facts,
    build_store,
    build_workspace,
)
from vllm_batch_dagster.core.creation import new_file_id
from vllm_batch_dagster.core.curation import CurationRules
from vllm_batch_dagster.core.errors import ConfigurationError
from vllm_batch_dagster.core.models import Batch, Chunk, Model
from vllm_batch_dagster.core.ports import BatchStore, EngineManager, FileStore, ModelCatalog, Workspace
from vllm_batch_dagster.core.preflight import ModelFacts
from vllm_batch_dagster.core.retry import RetryPolicy
from vllm_batch_dagster.settings import Settings
from vllm_batch_dagster.stages.inference import InferencePolicy, InferencePorts
from vllm_batch_dagster.stages.merging import MergePorts
from vllm_batch_dagster.stages.validation import ValidationLimits


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
    def workspace(self) -> Workspace:
        return build_workspace(self.settings)

    @cached_property
    def engines(self) -> EngineManager:
        return build_engines(self.settings)

    @cached_property
    def facts(self) -> ModelFacts:
        return build_model_facts(self.settings)

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
        )

    @property
    def inference_ports(self) -> InferencePorts:
        return InferencePorts(self.store, self.files, self.workspace, self.engines, self.clock)

    @property
    def merge_ports(self) -> MergePorts:
        return MergePorts(self.store, self.files, self.workspace, self.clock, lambda: new_file_id(secrets.token_bytes))

    @property
    def curation_rules(self) -> CurationRules:
        return CurationRules(min_output_tokens=self.settings.curate_min_output_tokens)

    @property
    def api_url(self) -> str:
        return self.settings.api_url
