"""docker-compose.yml by Compose's own check, without an engine; and what it shares with the rest of the project."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from vllm_batch_dagster.adapters.engine.config import EngineConfig
from vllm_batch_dagster.adapters.engine.launch import plan_launch
from vllm_batch_dagster.core.models import Model
from vllm_batch_dagster.settings import PROJECT_ROOT, Settings

COMPOSE = Path(sys.executable).with_name("docker-compose")
SERVICES = {"postgres", "init", "code", "web", "daemon", "api"}
OURS = SERVICES - {"postgres"}
SETTINGS = {name.upper() for name in Settings.model_fields}
# Variables of our containers that are no settings of ours, and of .env that only Compose or one container reads.
OF_DAGSTER = {
    "DAGSTER_HOME",
    "DAGSTER_SENSOR_GRPC_TIMEOUT_SECONDS",
    "DAGSTER_GRPC_SHUTDOWN_GRACE_PERIOD",
    "CODE_SERVER_HOST",  # workspace.yaml
}
OF_COMPOSE = {"VLLM_BATCH_VERSION"}
OF_ENGINE = {"HF_TOKEN"}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The file and the shipped example in a folder of their own, so that a reader's .env has no say."""
    shutil.copy(PROJECT_ROOT / "docker-compose.yml", tmp_path)
    shutil.copy(PROJECT_ROOT / ".env.example", tmp_path / ".env")
    return tmp_path


def compose(project: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run Compose in `project` with an environment that sets nothing of ours."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(project)}
    command = [str(COMPOSE), *arguments]
    run = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0 or not check, run.stderr
    return run


def read_services(project: Path, *arguments: str) -> dict[str, Any]:
    """Return the services as Compose understands them."""
    services: dict[str, Any] = json.loads(compose(project, *arguments, "config", "--format", "json").stdout)["services"]
    return services


def test_the_file_is_valid_and_starts_the_stack_without_an_engine(project: Path) -> None:
    assert set(read_services(project)) == SERVICES


def test_the_profile_gpu_adds_the_engine_and_its_card(project: Path) -> None:
    services = read_services(project, "--profile", "gpu")
    assert set(services) == SERVICES | {"engine"}
    (device,) = services["engine"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"


def test_without_a_password_it_says_which_file_to_write(project: Path) -> None:
    (project / ".env").unlink()
    refused = compose(project, "config", "-q", check=False)
    assert refused.returncode != 0
    assert "POSTGRES_PASSWORD is missing a value: set it in .env, see .env.example" in refused.stderr


def test_compose_refuses_what_it_does_not_know(project: Path) -> None:
    """The check that the other tests rely on does check."""
    file = project / "docker-compose.yml"
    file.write_text(file.read_text().replace("    depends_on:", "    depend_on:", 1))
    assert compose(project, "config", "-q", check=False).returncode != 0


def test_ports_are_published_on_loopback_only(project: Path) -> None:
    services = read_services(project, "--profile", "gpu")
    published = {name: port for name, service in services.items() for port in service.get("ports", [])}
    assert {name: (port["host_ip"], port["target"]) for name, port in published.items()} == {
        "api": ("127.0.0.1", 4080),
        "web": ("127.0.0.1", 3000),
    }


def test_the_api_may_listen_in_its_container(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the container sets is enough for the API to accept its own address."""
    from api_shim import server

    for name, value in read_services(project)["api"]["environment"].items():
        if name in SETTINGS:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(server, "bind_listener", _reached)
    monkeypatch.setattr(server, "configure_logs", lambda _format: None)
    monkeypatch.chdir(project)
    with pytest.raises(_Reached):
        server.serve(Settings())


class _Reached(Exception):
    pass


def _reached(host: str, port: int) -> None:
    raise _Reached


@pytest.mark.parametrize("service", sorted(OURS))
def test_every_variable_of_our_containers_is_a_setting_or_dagsters(project: Path, service: str) -> None:
    given = set(read_services(project)[service]["environment"])
    assert given - SETTINGS - OF_DAGSTER - OF_ENGINE == set()


def test_every_variable_that_the_file_and_the_example_read_is_known() -> None:
    file = (PROJECT_ROOT / "docker-compose.yml").read_text()
    example = (PROJECT_ROOT / ".env.example").read_text()
    asked = set(re.findall(r"\$\{([A-Z_]+)", file)) | set(re.findall(r"^#?([A-Z_]+)=", example, re.MULTILINE))
    assert "POSTGRES_PASSWORD" in asked
    assert asked - SETTINGS - OF_COMPOSE - OF_ENGINE == set()


def test_dagster_is_configured_alike_but_for_its_storage() -> None:
    plain = yaml.safe_load((PROJECT_ROOT / "dagster.yaml").read_text())
    contained = yaml.safe_load((PROJECT_ROOT / "docker" / "dagster.yaml").read_text())
    assert "postgres" in contained.pop("storage")
    assert contained == plain


def test_the_engine_container_is_the_pinned_vllm_with_the_options_that_we_rely_on(project: Path) -> None:
    engine = read_services(project, "--profile", "gpu")["engine"]
    pins = (PROJECT_ROOT / "requirements" / "engine-cuda.txt").read_text()
    (version,) = re.findall(r"^vllm==([\d.]+)", pins, re.MULTILINE)
    assert engine["image"] == f"vllm/vllm-openai:v{version}"

    config = EngineConfig(folder=project, python="python")
    ours = plan_launch(config, "cuda", Model(name="m", path="m"), is_local=False).argv
    options = {word for word in ours if word.startswith("--")} - {"--served-model-name"}
    assert {word.partition("=")[0] for word in engine["command"]} - {"--model"} == options


def test_what_the_image_copies_is_in_the_repository() -> None:
    dockerfile = (PROJECT_ROOT / "docker" / "Dockerfile").read_text()
    copied = [
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", dockerfile, re.MULTILINE)
        for source in line.split()[:-1]
    ]
    assert len(copied) > 5
    assert [source for source in copied if not (PROJECT_ROOT / source).exists()] == []
