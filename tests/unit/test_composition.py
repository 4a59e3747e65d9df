"""The composition root hands every setting on to the adapter that it is for."""

from pathlib import Path

from pydantic import SecretStr

from vllm_batch_dagster.adapters.engine.remote import RemoteEngines
from vllm_batch_dagster.composition import build_catalog, build_engines
from vllm_batch_dagster.settings import Settings


def settings_of(tmp_path: Path, **changes: object) -> Settings:
    values = {"vllm_batch_home": tmp_path, "engine_url": "http://127.0.0.1:9", "engine_api_key": SecretStr("secret")}
    return Settings.model_validate(values | changes)


def test_servers_of_somebody_else_get_the_limits(tmp_path: Path) -> None:
    engines = build_engines(
        settings_of(tmp_path, engine_start_seconds=11, engine_restarts=5, engine_stall_seconds=13, max_num_seqs=17)
    )
    assert isinstance(engines, RemoteEngines)
    config = engines._config
    assert (config.start_seconds, config.restarts, config.pace.stall_seconds, config.max_num_seqs) == (11, 5, 13, 17)
    assert config.api_key == "secret"


def test_the_catalogue_asks_with_the_key(tmp_path: Path) -> None:
    catalog = build_catalog(settings_of(tmp_path))
    assert "secret" in [value for value in vars(catalog).values() if isinstance(value, str)]
