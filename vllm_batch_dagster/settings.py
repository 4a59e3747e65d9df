"""Every setting of the product, read once by each front door; printed by `vllm-batch config`.

Variables carry no prefix: the seed's names (`CHUNK_SIZE`, `POSTGRES_HOST`, ...) are kept. docs/configuration.md
lists each of them; a docs test compares the two.
"""

import os
import sys
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import SettingsConfigDict

from handlers.settings import HandlerSettings
from vllm_batch_dagster.core.modes import ValidationMode
from vllm_batch_dagster.core.windows import WindowRule
from vllm_batch_dagster.curation_settings import CurationSettings
from vllm_batch_dagster.delivery_settings import DeliverySettings
from vllm_batch_dagster.pause_settings import PauseSettings

LOOPBACK = "127.0.0.1"
WILDCARDS = frozenset({"", "0.0.0.0", "::"})
PROJECT_ROOT = Path(__file__).resolve().parent.parent


def _engine_python() -> str:
    bundled = PROJECT_ROOT / ".venv-engine" / "bin" / "python"
    return str(bundled) if bundled.exists() else sys.executable


class Settings(CurationSettings, DeliverySettings, HandlerSettings, PauseSettings):
    """Settings from the environment and, below it, from a `.env` file in the working directory."""

    model_config = SettingsConfigDict(env_file=".env", extra="ignore", frozen=True)

    vllm_batch_home: Path = Field(
        default=Path(".vllm-batch"),
        description="State folder: database, files, journals, Dagster's own state, logs.",
    )

    api_host: str = Field(default="127.0.0.1", description="Address of the OpenAI-compatible API.")
    api_port: int = Field(default=4080, ge=1, le=65535, description="Port of the OpenAI-compatible API.")
    api_allow_remote: bool = Field(
        default=False,
        description="Let API_HOST be an address that other machines reach although no key exists, so that the API "
        "asks nobody who they are. For a container whose port is published on loopback.",
    )
    vllm_batch_api_key: SecretStr = Field(
        default=SecretStr(""),
        description="Key that the commands of `vllm-batch` send to the API. Empty: OPENAI_API_KEY, if that is set.",
    )
    dagster_host: str = Field(
        default="127.0.0.1",
        description="Address of the Dagster UI. It has no authentication: keep it on loopback.",
    )
    dagster_port: int = Field(default=3000, ge=1, le=65535, description="Port of the Dagster UI.")
    code_server_port: int = Field(
        default=4266, ge=1, le=65535, description="Loopback port of Dagster's code server (gRPC)."
    )

    postgres_host: str = Field(
        default="", description="PostgreSQL server of the batch store. Empty: SQLite in the state folder."
    )
    postgres_port: int = Field(default=5432, ge=1, le=65535, description="PostgreSQL port.")
    postgres_db: str = Field(default="vllm_batch", description="PostgreSQL database.")
    postgres_user: str = Field(default="vllm", description="PostgreSQL user.")
    postgres_password: SecretStr = Field(default=SecretStr(""), description="PostgreSQL password.")

    max_file_bytes: int = Field(default=1 << 30, ge=0, description="Largest upload in bytes. 0: no limit.")
    max_requests_per_batch: int = Field(
        default=0,
        ge=0,
        description="Most lines in a batch, and most embedding inputs in all of its lines together. 0: no limit. "
        "OpenAI's is 50000.",
    )
    max_requests_per_minute: int = Field(
        default=0, ge=0, description="Most API requests of one project per minute. 0: no limit."
    )
    max_queued_lines: int = Field(
        default=0, ge=0, description="Most unanswered lines in the open batches of one project. 0: no limit."
    )
    max_stored_bytes: int = Field(
        default=0,
        ge=0,
        description="Most bytes that the files of one project may take before uploads are refused. 0: no limit.",
    )
    completion_windows: WindowRule = Field(
        default=WindowRule.ANY,
        description="Which completion_window a batch may have. any: 24h, and as an extension any duration from 1m to "
        "30d. 24h: only 24h, exactly as OpenAI.",
    )
    validation_mode: ValidationMode = Field(
        default=ValidationMode.STRICT,
        description="How an input file is judged when the batch's metadata does not say `validation`. strict: one bad "
        "line fails the batch, as at OpenAI. lenient: bad lines go to the error file, the others run.",
    )
    max_validation_errors: int = Field(
        default=1000, ge=1, description="How many bad lines a failed batch lists at most."
    )

    chunk_size: int = Field(default=5000, ge=1, description="Lines per chunk.")
    chunk_slots: int = Field(
        default=40,
        ge=1,
        le=1000,
        description="Chunk partitions per batch in Dagster. A batch with more chunks gets larger ones.",
    )
    max_chunk_attempts: int = Field(
        default=3,
        ge=1,
        description="Attempts at a chunk that end in an engine failure before its unanswered lines go to the error "
        "file with code engine_failure.",
    )
    max_line_attempts: int = Field(
        default=4, ge=1, description="Attempts at a line that the engine answers with a retryable status."
    )
    journal_commit_seconds: float = Field(
        default=0.2, gt=0, le=5, description="Longest time that an answer waits for its fsync."
    )
    journal_commit_records: int = Field(default=256, ge=1, description="Most answers that wait for one fsync.")

    models_file: Path | None = Field(
        default=None, description="Model catalogue (models.yaml). Default: the one that `make setup` wrote."
    )
    model: str = Field(
        default="", description="One more model: a Hugging Face id or a local folder, served under that name."
    )
    engine_url: str = Field(
        default="",
        description="Base URL of a vLLM server that somebody else runs (several: comma-separated). Empty: we run it.",
    )
    engine_api_key: SecretStr = Field(default=SecretStr(""), description="Bearer key for ENGINE_URL.")
    engine_python: str = Field(default_factory=_engine_python, description="Python of the environment that holds vLLM.")
    engine_device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Device of the engine. auto: cuda where nvidia-smi answers, else cpu."
    )
    engine_port: int = Field(
        default=8000, ge=0, le=65535, description="Preferred loopback port of the engine; another if taken."
    )
    engine_args: str = Field(default="", description="Further `vllm serve` arguments, as on a command line.")
    engine_start_tries: int = Field(
        default=3,
        ge=1,
        description="Starts of the engine for one request before it fails; each failure for want of memory goes one "
        "rung down the memory ladder.",
    )
    engine_start_seconds: int = Field(default=900, ge=10, description="How long the engine may take until it is ready.")
    engine_idle_seconds: int = Field(
        default=600, ge=0, description="An engine that nobody used for this long is stopped. 0: never."
    )
    engine_restarts: int = Field(
        default=3,
        ge=0,
        description="Engine restarts within one attempt at a chunk without a new answer between, unless a line is "
        "suspected: then the search for it decides.",
    )
    engine_stall_seconds: int = Field(
        default=120,
        ge=5,
        description="Requests running, but no token and no growth of the KV cache for this long: the engine is hung.",
    )
    max_num_seqs: int = Field(
        default=0, ge=0, description="Sequences that the engine runs at once. 0: 256 on a GPU, 128 on a CPU."
    )
    max_num_batched_tokens: int = Field(
        default=0, ge=0, description="Tokens per engine step. 0: 8192 on a GPU, vLLM's default on a CPU."
    )
    gpu_memory_utilization: float = Field(
        default=0.92, gt=0, le=1, description="Share of the GPU's memory for the engine."
    )
    cpu_kvcache_gib: int = Field(default=2, ge=1, description="Memory for the KV cache on a CPU, in GiB.")

    ui_samples: bool = Field(
        default=False,
        description="Show sample prompts and answers in the Dagster UI, which has no authentication.",
    )
    batch_retention_days: int = Field(
        default=30,
        ge=0,
        description="Days after its end for which a batch keeps its journals, chunks and Dagster runs, and can be run "
        "again. 0: until its files are gone.",
    )
    batch_record_days: int = Field(
        default=0,
        ge=0,
        description="Days after its end for which the API knows a batch whose data has gone. 0: for ever.",
    )
    dataset_retention_days: int = Field(
        default=0, ge=0, description="Days for which curated data sets are kept. 0: for ever."
    )
    inbox_folder: Path | None = Field(
        default=None,
        description="Drop folder: a .jsonl file that appears in it becomes a batch. Default: `inbox` in the state "
        "folder.",
    )
    inbox_settle_seconds: float = Field(
        default=3.0,
        ge=0,
        description="A dropped file is taken when it has not changed for this long and nobody has it open for writing.",
    )
    log_format: Literal["console", "json"] = Field(default="console", description="Format of our log lines.")

    @field_validator("vllm_batch_home", "models_file", "inbox_folder")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return value.expanduser().absolute() if value is not None else None

    @property
    def database_url(self) -> str:
        """SQLAlchemy URL of the batch store; the password is in it, so never log it."""
        if not self.postgres_host:
            return f"sqlite:///{self.vllm_batch_home / 'batches.db'}"
        from sqlalchemy import URL

        url = URL.create(
            "postgresql+psycopg",
            self.postgres_user,
            self.postgres_password.get_secret_value() or None,
            self.postgres_host,
            self.postgres_port,
            self.postgres_db,
        )
        return url.render_as_string(hide_password=False)

    @property
    def catalogue_path(self) -> Path:
        """The model catalogue: MODELS_FILE, or the one in MODEL_CACHE that the set-up wrote."""
        cache = Path(os.environ.get("MODEL_CACHE", str(PROJECT_ROOT / ".models")))
        return self.models_file or cache / "models.yaml"

    @property
    def api_url(self) -> str:
        """How a client on this machine reaches the API."""
        return local_url(self.api_host, self.api_port)

    @property
    def dagster_url(self) -> str:
        """How a browser on this machine reaches the Dagster UI."""
        return local_url(self.dagster_host, self.dagster_port)

    @property
    def files_folder(self) -> Path:
        return self.vllm_batch_home / "files"

    @property
    def inbox_path(self) -> Path:
        return self.inbox_folder or self.vllm_batch_home / "inbox"

    @property
    def batches_folder(self) -> Path:
        return self.vllm_batch_home / "batches"

    @property
    def datasets_folder(self) -> Path:
        return self.vllm_batch_home / "datasets"

    @property
    def engine_folder(self) -> Path:
        return self.vllm_batch_home / "engine"

    @property
    def dagster_home(self) -> Path:
        return self.vllm_batch_home / "dagster"

    @property
    def log_folder(self) -> Path:
        return self.vllm_batch_home / "logs"


def local_url(host: str, port: int) -> str:
    """Return the http URL of a local listener; a wildcard address is reached on loopback."""
    reachable = LOOPBACK if host in WILDCARDS else host
    return f"http://{f'[{reachable}]' if ':' in reachable else reachable}:{port}"


def load_settings() -> Settings:
    """Read the settings now. Raises pydantic.ValidationError, which names the variable."""
    return Settings()
