"""Builds the adapters that the settings ask for. Called by the front doors (API, Dagster, command line) only."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from vllm_batch_dagster.core.annotation_ports import AnnotationSource
from vllm_batch_dagster.core.dispatch_hours import parse_hours
from vllm_batch_dagster.core.errors import ReviewFailed
from vllm_batch_dagster.core.gpu_health import GpuLimits, Gpus
from vllm_batch_dagster.core.inbox_ports import DropFolder
from vllm_batch_dagster.core.pause_ports import Watch
from vllm_batch_dagster.core.ports import BatchStore, Clock, EngineManager, FileStore, ModelCatalog, Workspace
from vllm_batch_dagster.core.preflight import ModelFacts
from vllm_batch_dagster.core.provenance import Provenance
from vllm_batch_dagster.core.retention import RetentionRules
from vllm_batch_dagster.core.retention_ports import Disk
from vllm_batch_dagster.core.webhook_ports import WebhookSender
from vllm_batch_dagster.core.webhook_urls import AllowedHosts, read_allowed_hosts
from vllm_batch_dagster.settings import Settings
from vllm_batch_dagster.stages.pausing import PauseBoard
from vllm_batch_dagster.stages.watching import DiskWatch, GpuWatch, ScheduleWatch

_PUSH_TURN_SECONDS = 600.0

if TYPE_CHECKING:
    from handlers.courier import HandlerCourier
    from vllm_batch_dagster.adapters.curation_file import LoadedRules
    from vllm_batch_dagster.adapters.label_studio import LabelStudioBoard


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


def load_curation_rules(settings: Settings) -> "LoadedRules":
    """Read the rules of the curation as they are now. Raises ConfigurationError, which names the place in the file."""
    from vllm_batch_dagster.adapters.curation_file import load_rules

    return load_rules(settings.curation_file)


def ask_label_studio(settings: Settings) -> str:
    """Return the user whose key LABEL_STUDIO_API_KEY is. Raises ReviewFailed."""
    from vllm_batch_dagster.adapters.label_studio import LabelStudioSession

    key = settings.label_studio_api_key.get_secret_value().strip()
    with LabelStudioSession(settings.label_studio_url, key) as session:
        return str(session.get("/api/current-user/whoami")["email"])


@contextmanager
def open_review_board(settings: Settings, project_id: str) -> Iterator["LabelStudioBoard"]:
    """The Label Studio project for the batches of an API project, for one push at a time on this state folder.

    The lock only saves a second pusher its work: tasks that two of them made twice are made one by the next look
    (stages/pushing.py), so machines that share a project need no lock in the store. Raises ReviewFailed.
    """
    from filelock import FileLock, Timeout

    from vllm_batch_dagster.adapters.label_studio import LabelStudioSession, open_board, title_of

    key = settings.label_studio_api_key.get_secret_value().strip()
    settings.vllm_batch_home.mkdir(parents=True, exist_ok=True)
    try:
        with (
            FileLock(settings.vllm_batch_home / "label-studio.lock", timeout=_PUSH_TURN_SECONDS),
            LabelStudioSession(settings.label_studio_url, key) as session,
        ):
            yield open_board(session, settings.label_studio_project_id, title_of(project_id))
    except Timeout:
        raise ReviewFailed(f"another push was at work for {_PUSH_TURN_SECONDS:.0f} s") from None


def build_model_facts(settings: Settings) -> ModelFacts:
    from vllm_batch_dagster.adapters.model_facts import LocalModelFacts

    return LocalModelFacts(
        settings.engine_folder,
        engine_url=settings.engine_url,
        api_key=settings.engine_api_key.get_secret_value(),
        extra_args=settings.engine_args,
    )


@contextmanager
def open_annotation_sources(settings: Settings) -> Iterator[Sequence[AnnotationSource]]:
    """The Label Studio projects from which reviews come back. Raises ReviewFailed."""
    from vllm_batch_dagster.adapters.label_studio import LabelStudioSession
    from vllm_batch_dagster.adapters.label_studio.annotations import open_annotations

    key = settings.label_studio_api_key.get_secret_value().strip()
    with LabelStudioSession(settings.label_studio_url, key) as session:
        yield open_annotations(session, settings.label_studio_project_id)


def hold_reviews(settings: Settings) -> AbstractContextManager[object]:
    """One pull at a time on this state folder; another one waits. Two at once would write the same rows twice, which
    readers pass over, but not who counts them."""
    from filelock import FileLock

    settings.datasets_folder.mkdir(parents=True, exist_ok=True)
    return FileLock(settings.datasets_folder / "reviewed.lock")


def build_provenance(settings: Settings) -> Provenance:
    """Who can tell which engine and model answer."""
    from vllm_batch_dagster.adapters.provenance import ExternalProvenance, OwnProvenance

    if settings.engine_url:
        return ExternalProvenance(settings.engine_url, settings.engine_api_key.get_secret_value())
    return OwnProvenance(settings.engine_folder, settings.engine_device)


def build_drop_folder(settings: Settings) -> DropFolder:
    from vllm_batch_dagster.adapters.drop_folder import LocalDropFolder

    return LocalDropFolder(settings.inbox_path, settings.inbox_settle_seconds)


def allowed_hosts(settings: Settings) -> AllowedHosts:
    """Where webhooks may go although it is not on the public internet."""
    return read_allowed_hosts(settings.webhook_allowed_hosts)


def build_webhook_sender(settings: Settings) -> WebhookSender:
    from vllm_batch_dagster.adapters.webhooks import HttpWebhookSender

    return HttpWebhookSender(allowed_hosts(settings))


def build_handler_courier(settings: Settings, files: FileStore) -> "HandlerCourier":
    """What gives results to the handlers of this installation."""
    from handlers.courier import HandlerCourier, read_names

    return HandlerCourier(
        files,
        limit_seconds=settings.handler_timeout_seconds,
        allowed=read_names(settings.handlers),
        modules=read_names(settings.handler_modules),
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
            start_tries=settings.engine_start_tries,
            restarts=settings.engine_restarts,
            stall_seconds=settings.engine_stall_seconds,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            cpu_kvcache_gib=settings.cpu_kvcache_gib,
        )
    )


def build_pauses(settings: Settings, store: BatchStore, clock: Clock, *, with_gpus: bool = False) -> PauseBoard:
    """The board of all pauses. The GPUs are looked at by who sends to the engine or has it sent to."""
    from vllm_batch_dagster.adapters.local_time import local_time

    passing: list[Watch] = []
    if hours := parse_hours(settings.dispatch_hours):
        to_local = local_time(settings.dispatch_time_zone)
        passing.append(ScheduleWatch(hours, to_local, settings.dispatch_hours))
    if settings.disk_reserve_bytes:
        home = settings.vllm_batch_home
        passing.append(DiskWatch(lambda: shutil.disk_usage(home).free, settings.disk_reserve_bytes, str(home)))
    gpus = build_gpus(settings) if with_gpus else None
    kept = [GpuWatch(gpus, gpu_limits(settings))] if gpus else []
    return PauseBoard(store.pauses, clock, passing=passing, kept=kept)


def build_gpus(settings: Settings) -> Gpus | None:
    """The GPUs of our own engine; None where it has none or nobody wants to know."""
    from vllm_batch_dagster.adapters.engine.config import resolve_device
    from vllm_batch_dagster.adapters.engine.folder import EngineFolder
    from vllm_batch_dagster.adapters.gpu import NvmlGpus, visible_devices

    if settings.engine_url or not settings.gpu_gate or resolve_device(settings.engine_device) != "cuda":
        return None
    return NvmlGpus(EngineFolder(settings.engine_folder).pids, visible_devices())


def gpu_limits(settings: Settings) -> GpuLimits:
    return GpuLimits(
        pause_celsius=settings.gpu_pause_celsius,
        resume_celsius=settings.gpu_resume_celsius,
        pause_other_memory=settings.gpu_pause_other_memory,
        resume_other_memory=settings.gpu_resume_other_memory,
        ecc_errors=settings.gpu_max_ecc_errors,
    )
