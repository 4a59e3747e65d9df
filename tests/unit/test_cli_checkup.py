"""The checks of `vllm-batch doctor`, each with something that is well and something that is not."""

import json
import os
import socket
import sys
from collections import namedtuple
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_batch_dagster.cli import checkup
from vllm_batch_dagster.cli.main import app
from vllm_batch_dagster.cli.state_folder import hold_stack
from vllm_batch_dagster.composition import build_store
from vllm_batch_dagster.core.models import Model
from vllm_batch_dagster.settings import Settings

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    with ExitStack() as probes:  # all at once: one that is closed may be given out again
        free = [probes.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(3)]
    return Settings(
        vllm_batch_home=tmp_path / "home",
        code_server_port=free[0],
        dagster_port=free[1],
        api_port=free[2],
        models_file=write_catalogue(tmp_path),
        engine_url="",
        postgres_host="",
    )


@pytest.fixture
def taken(settings: Settings) -> Iterator[Settings]:
    """The settings with somebody else on the port of the API."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield settings.model_copy(update={"api_port": server.getsockname()[1]})


def write_catalogue(folder: Path) -> Path:
    model = folder / "tiny"
    model.mkdir()
    (model / "config.json").write_text("{}")
    catalogue = folder / "models.yaml"
    catalogue.write_text(f"models:\n  - name: tiny\n    path: {model}\n")
    return catalogue


def write_program(folder: Path, name: str, text: str) -> Path:
    program = folder / name
    program.write_text(f"#!{sys.executable}\n{text}")
    program.chmod(0o755)
    return program


def test_this_python_is_supported() -> None:
    assert checkup.check_python().level == "ok"


def test_another_python_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 0))
    finding = checkup.check_python()
    assert finding.level == "fail"
    assert "3.11" in finding.mend


@pytest.mark.parametrize(("free_gib", "level"), [(50, "ok"), (5, "warn"), (0.5, "fail")])
def test_disk(settings: Settings, monkeypatch: pytest.MonkeyPatch, free_gib: float, level: str) -> None:
    monkeypatch.setattr(checkup.shutil, "disk_usage", lambda _folder: Usage(0, 0, int(free_gib * checkup.GIB)))
    finding = checkup.check_disk(settings)
    assert finding.level == level
    assert bool(finding.mend) is (level != "ok")


def test_disk_of_a_folder_that_is_not_there_yet(settings: Settings, tmp_path: Path) -> None:
    assert str(tmp_path) in checkup.check_disk(settings).text


def test_free_ports(settings: Settings) -> None:
    assert [finding.level for finding in checkup.check_ports(settings)] == ["ok"] * 3


def test_a_taken_port_is_a_failure_unless_our_stack_has_it(taken: Settings) -> None:
    assert [finding.level for finding in checkup.check_ports(taken)] == ["ok", "ok", "fail"]
    assert f"pid {os.getpid()}" in list(checkup.check_ports(taken))[-1].text
    taken.vllm_batch_home.mkdir()
    with hold_stack(taken.vllm_batch_home):
        assert [finding.level for finding in checkup.check_ports(taken)] == ["ok"] * 3


def test_processors() -> None:
    assert checkup.check_processor(frozenset({"avx2", "avx512f"})).level == "ok"
    assert checkup.check_processor(frozenset({"avx2"})).level == "warn"
    assert checkup.check_processor(frozenset({"sse2"})).level == "fail"


def test_another_architecture_is_not_judged_by_its_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup.platform, "machine", lambda: "aarch64")
    assert checkup.check_processor(frozenset()).level == "ok"


class TestDevice:
    """nvidia-smi as the first of the PATH, so that the machine does not matter."""

    def look(self, folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> checkup.Finding:
        write_program(folder, "nvidia-smi", text)
        monkeypatch.setenv("PATH", str(folder))
        return checkup.check_device()

    def test_gpu(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        finding = self.look(tmp_path, monkeypatch, "print('Some GPU, 555.1, 16376 MiB')")
        assert (finding.check, finding.level) == ("gpu", "ok")
        assert "555.1" in finding.text

    def test_broken_driver(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        finding = self.look(tmp_path, monkeypatch, "print('no driver'); raise SystemExit(9)")
        assert finding.level == "fail"
        assert "no driver" in finding.text

    def test_no_gpu(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        assert checkup.check_device().check == "processor"


class TestEngineEnvironment:
    def test_with_vllm(self, settings: Settings, tmp_path: Path) -> None:
        python = write_program(tmp_path, "python", "print('0.32.0')")
        finding = checkup.check_engine_environment(settings.model_copy(update={"engine_python": str(python)}))
        assert finding.level == "ok"
        assert "vLLM 0.32.0" in finding.text

    def test_without_vllm(self, settings: Settings) -> None:
        finding = checkup.check_engine_environment(settings.model_copy(update={"engine_python": sys.executable}))
        assert finding.level == "fail"
        assert "make setup" in finding.mend

    def test_without_python(self, settings: Settings, tmp_path: Path) -> None:
        missing = settings.model_copy(update={"engine_python": str(tmp_path / "none")})
        assert checkup.check_engine_environment(missing).level == "fail"

    def test_somebody_elses_needs_none(self, settings: Settings) -> None:
        theirs = settings.model_copy(update={"engine_url": "http://box:8000", "engine_python": "/nowhere"})
        assert checkup.check_engine_environment(theirs).level == "ok"


class TestModels:
    def test_the_catalogue_and_each_folder(self, settings: Settings) -> None:
        assert {finding.check: finding.level for finding in checkup.check_models(settings)} == {"model tiny": "ok"}

    def test_a_missing_catalogue(self, settings: Settings, tmp_path: Path) -> None:
        lost = settings.model_copy(update={"models_file": tmp_path / "none.yaml"})
        assert [finding.level for finding in checkup.check_models(lost)] == ["fail"]

    def test_a_folder_without_a_model(self, tmp_path: Path) -> None:
        assert checkup.check_model(Model("empty", str(tmp_path))).level == "fail"
        assert checkup.check_model(Model("gone", str(tmp_path / "gone"))).level == "fail"

    def test_a_model_of_hugging_face_is_loaded_later(self) -> None:
        assert checkup.check_model(Model("llama", "someone/llama")).level == "ok"


def test_the_state_folder(settings: Settings, tmp_path: Path) -> None:
    assert "is made by" in checkup.check_state_folder(settings).text
    settings.vllm_batch_home.mkdir()
    assert "fsync works" in checkup.check_state_folder(settings).text
    (tmp_path / "file").write_text("")
    blocked = settings.model_copy(update={"vllm_batch_home": tmp_path / "file"})
    assert checkup.check_state_folder(blocked).level == "fail"


def test_the_store(settings: Settings) -> None:
    assert "made by" in checkup.check_store(settings).text
    assert not settings.vllm_batch_home.exists(), "a check changes nothing"
    settings.vllm_batch_home.mkdir()
    build_store(settings)
    assert "0 open batches" in checkup.check_store(settings).text


def test_a_broken_store(settings: Settings) -> None:
    settings.vllm_batch_home.mkdir()
    (settings.vllm_batch_home / "batches.db").write_bytes(b"this is no database " * 100)
    assert checkup.check_store(settings).level == "fail"


def test_no_engine_runs(settings: Settings) -> None:
    assert checkup.check_running_engine(settings).level == "ok"


class TestCommand:
    @pytest.fixture(autouse=True)
    def environment(self, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("VLLM_BATCH_HOME", str(settings.vllm_batch_home))
        monkeypatch.setenv("MODELS_FILE", str(settings.models_file))
        for port in ("CODE_SERVER_PORT", "DAGSTER_PORT", "API_PORT"):
            monkeypatch.setenv(port, str(getattr(settings, port.lower())))

    def test_a_failure_gives_exit_code_1_and_the_mend(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ENGINE_PYTHON", "/nowhere/python")
        result = CliRunner().invoke(app, ["doctor"])
        assert result.exit_code == 1
        assert "mend: run `make setup`" in result.output

    def test_json(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ENGINE_URL", "http://127.0.0.1:9")
        monkeypatch.setattr(checkup, "_cpu_flags", lambda: frozenset({"avx512f"}))
        result = CliRunner().invoke(app, ["doctor", "--json"])
        findings = json.loads(result.output)
        assert {"check", "level", "text", "mend"} == set(findings[0])
        assert result.exit_code == int(any(finding["level"] == "fail" for finding in findings))
        assert "python" in [finding["check"] for finding in findings]
