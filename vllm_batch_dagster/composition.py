"""Builds the adapters that the settings ask for. Called by the front doors (API, Dagster, command line) only."""

from vllm_batch_dagster.core.ports import BatchStore, EngineManager, FileStore, ModelCatalog, Workspace
from vllm_batch_dagster.core.preflight import ModelFacts
from vllm_batch_dagster.core.retention import RetentionRules
from vllm_batch_dagster.core.retention_ports import Disk
from vllm_batch_dagster.settings import Settings


def build_store(settings: Settings) -> BatchStore:
    """Open the batch store, creating or upgrading its schema. Safe to call from several processes at once."""
    from vllm_batch_dagster.adapters.store import open_store

    return open_store(settings.database_url)


def build_files(settings: Settings) -> FileStore:
    from vllm_batch_dagster.adapters.local_files import LocalFiles

    return LocalFiles(settings.files_folder)


def sweep_files(settings: Settings) -> None:
    """Remove the partial files of killed processes. For whoever starts the stack, before anybody writes."""
    from vllm_batch_dagster.adapters.local_files import LocalFiles

    LocalFiles(settings.files_folder).sweep()


def build_workspace(settings: Settings) -> Workspace:
    from vllm_batch_dagster.adapters.local_files import LocalWorkspace

    return LocalWorkspace(settings.batches_folder, settings.datasets_folder)


def build_disk(settings: Settings) -> Disk:
    from vllm_batch_dagster.adapters.local_disk import LocalDisk

    return LocalDisk(settings.files_folder, settings.batches_folder, settings.datasets_folder)


def retention_rules(settings: Settings) -> RetentionRules:
    return RetentionRules(
        batch_days=settings.batch_retention_days,
        record_days=settings.batch_record_days,
        dataset_days=settings.dataset_retention_days,
    )


def build_catalog(settings: Settings) -> ModelCatalog:
    """Read the model catalogue. Raises ConfigurationError with the mend when it is missing or wrong."""
    from vllm_batch_dagster.adapters.catalog import load_catalog

    return load_catalog(
        settings.catalogue_path,
        extra=settings.model,
        engine_url=settings.engine_url,
        api_key=settings.engine_api_key.get_secret_value(),
    )


def build_model_facts(settings: Settings) -> ModelFacts:
    from vllm_batch_dagster.adapters.model_facts import LocalModelFacts

    return LocalModelFacts(
        settings.engine_folder,
        engine_url=settings.engine_url,
        api_key=settings.engine_api_key.get_secret_value(),
        extra_args=settings.engine_args,
    )


def build_engines(settings: Settings) -> EngineManager:
    """The manager of our own engine, or of the servers behind ENGINE_URL."""
    from vllm_batch_dagster.adapters.engine import connect_engines, manage_engine
    from vllm_batch_dagster.adapters.engine.config import EngineConfig

    if settings.engine_url:
        return connect_engines(
            settings.engine_url,
            settings.engine_api_key.get_secret_value(),
            settings.max_num_seqs,
            start_seconds=settings.engine_start_seconds,
            restarts=settings.engine_restarts,
            stall_seconds=settings.engine_stall_seconds,
        )
    return manage_engine(
        EngineConfig(
            folder=settings.engine_folder,
            python=settings.engine_python,
            device=settings.engine_device,
            port=settings.engine_port,
            extra_args=settings.engine_args,
            start_seconds=settings.engine_start_seconds,
            restarts=settings.engine_restarts,
            stall_seconds=settings.engine_stall_seconds,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            cpu_kvcache_gib=settings.cpu_kvcache_gib,
        )
    )
