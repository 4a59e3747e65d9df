"""The `vllm-batch` command with its real services: start, Ctrl-C, deaths, restarts, and nothing left behind."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.stack import PORTS, START_SECONDS, STOP_SECONDS, Stack, descendants, free_ports, wait_for
from vllm_batch_dagster.adapters.engine import engine_status, manage_engine
from vllm_batch_dagster.adapters.engine.config import EngineConfig
from vllm_batch_dagster.adapters.simulated import Faults, SimulatedProcess
from vllm_batch_dagster.cli.processes import is_alive, run_workers
from vllm_batch_dagster.core.models import Model
from vllm_batch_dagster.settings import PROJECT_ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SERVICES = {"code", "web", "daemon", "api"}


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    stack = Stack(tmp_path)
    yield stack
    stack.run("down")


@pytest.fixture
def simulated() -> Iterator[SimulatedProcess]:
    """A simulated engine that nobody but the test owns. It hangs before the last of 200 lines, so however late a test
    looks, the batch is not over."""
    options = ("--model", "tiny", "--latency", "0.4", "--max-num-seqs", "8")
    with SimulatedProcess(*options, faults=Faults(hang_after=150)) as engine:
        yield engine


def start_simulated_engine(folder: Path) -> int:
    """Start an engine as a run does, on the stack's state folder, and return its pid."""
    simulated = ("{python}", "-m", "vllm_batch_dagster.adapters.simulated", "--port", "{port}", "--model", "{name}")
    config = EngineConfig(folder=folder, python=sys.executable, port=free_ports(1)[0], command=simulated)

    async def start() -> None:
        async with manage_engine(config).lease(Model("tiny", str(folder)), lambda _: None):
            pass

    asyncio.run(start())
    status = engine_status(folder)
    assert status is not None
    return status.pid


def write_lines(path: Path, count: int) -> Path:
    with path.open("w") as file:
        for number in range(count):
            body = {"model": "tiny", "messages": [{"role": "user", "content": f"question {number}"}]}
            line = {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    return path


def completed_lines(stack: Stack) -> int:
    return sum(batch["completed"] for batch in stack.status()["batches"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_everything(stack: Stack, number: signal.Signals) -> None:
    up = stack.start_and_wait()
    status = stack.status_when_well()
    assert status["ready"]
    assert {process["name"] for process in status["processes"]} == SERVICES
    assert all(process["health"] == "ok" and process["memory_bytes"] > 0 for process in status["processes"])
    seen = descendants(up.pid)
    assert len(seen) >= len(SERVICES)

    os.killpg(up.pid, number)  # to the whole group, as a terminal does

    assert up.wait(STOP_SECONDS) == 0, stack.said()
    stack.assert_nothing_left(seen)
    for name in SERVICES:
        assert (stack.home / "logs" / f"{name}.log").stat().st_size > 0
        assert f"\n{name:<6} | " in f"\n{stack.said()}"


def test_a_second_signal_kills_at_once(stack: Stack) -> None:
    up = stack.start_and_wait()
    seen = descendants(up.pid)
    os.kill(stack.pid_of("api"), signal.SIGSTOP)  # it cannot answer SIGTERM
    os.kill(up.pid, signal.SIGINT)
    wait_for(lambda: "stopping" in stack.said(), STOP_SECONDS)
    os.kill(up.pid, signal.SIGINT)
    assert up.wait(STOP_SECONDS) == 0
    stack.assert_nothing_left(seen)


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_a_dead_service_is_started_again(stack: Stack, name: str) -> None:
    up = stack.start_and_wait()
    seen = descendants(up.pid)
    pids = {service: stack.pid_of(service) for service in SERVICES}
    os.kill(pids[name], signal.SIGKILL)
    wait_for(lambda: stack.pid_of(name) != pids[name] and stack.status()["ready"], START_SECONDS)
    assert "this service was killed by SIGKILL; it is started again" in stack.said()
    assert all(stack.pid_of(other) == pids[other] for other in SERVICES - {name}), "the others are left alone"
    os.kill(up.pid, signal.SIGTERM)
    assert up.wait(STOP_SECONDS) == 0
    stack.assert_nothing_left(seen)


def test_a_killed_up_takes_its_services_along_and_can_be_followed_by_another(stack: Stack) -> None:
    up = stack.start_and_wait()
    seen = descendants(up.pid)
    up.kill()
    up.wait()
    wait_for(lambda: not any(map(is_alive, seen)), STOP_SECONDS)
    assert stack.run("status").returncode == 3
    following = stack.start_and_wait()
    os.kill(following.pid, signal.SIGTERM)
    assert following.wait(STOP_SECONDS) == 0


def test_detached_and_down_from_another_terminal(stack: Stack) -> None:
    started = stack.run("up", "--detach")
    assert started.returncode == 0, started.stderr
    assert f"http://127.0.0.1:{stack.env['API_PORT']}/v1" in started.stdout
    status = stack.status_when_well()
    seen = [psutil.Process(status["pid"]), *descendants(status["pid"])]

    second = stack.run("up")
    assert second.returncode == 1
    assert second.stderr.count("vllm-batch: ") == 1
    assert f"pid {status['pid']}" in second.stderr
    assert stack.status_when_well()["pid"] == status["pid"], "the first is not disturbed"

    stopped = stack.run("down")
    assert stopped.returncode == 0
    assert "Stopped `up`" in stopped.stdout
    stack.assert_nothing_left(seen)
    again = stack.run("down")
    assert again.returncode == 0
    assert "Nothing runs" in again.stdout


def test_the_engine_ends_with_the_stack(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(PROJECT_ROOT))
    up = stack.start_and_wait()
    engine = psutil.Process(start_simulated_engine(stack.home / "engine"))
    shown = stack.status()["engine"]
    assert (shown["model"], shown["state"], shown["pid"]) == ("tiny", "ready", engine.pid)
    wait_for(lambda: "engine | ready on" in stack.said(), STOP_SECONDS)
    os.kill(up.pid, signal.SIGTERM)
    assert up.wait(STOP_SECONDS) == 0
    stack.assert_nothing_left([engine])


def test_a_batch_goes_on_after_a_restart(stack: Stack, simulated: SimulatedProcess) -> None:
    """Stopped in the middle of a chunk: its run ends, nothing is left, and the next `up` finishes the batch."""
    stack.env["ENGINE_URL"] = simulated.url
    up = stack.start_and_wait()
    lines = write_lines(stack.folder / "lines.jsonl", 200)
    submitted = stack.run("submit", str(lines), "--metadata", "team=search")
    assert submitted.returncode == 0, submitted.stderr
    batch = submitted.stdout.strip()
    wait_for(lambda: completed_lines(stack) > 0, START_SECONDS)
    seen = descendants(up.pid)
    assert run_workers(stack.pid_of("code")) != []
    os.kill(up.pid, signal.SIGINT)
    assert up.wait(STOP_SECONDS) == 0
    stack.assert_nothing_left(seen)

    simulated.set_faults(Faults())
    stack.start_and_wait()
    watched = stack.run("watch", batch)
    assert watched.returncode == 0, watched.stderr
    assert "200/200" in watched.stdout
    loaded = stack.run("download", batch, "-o", str(stack.folder / "answers"))
    assert loaded.returncode == 0, loaded.stderr
    output = (stack.folder / "answers" / f"{batch}_output.jsonl").read_text().splitlines()
    assert [json.loads(line)["custom_id"] for line in output] == [f"line-{i}" for i in range(200)]


@pytest.mark.parametrize("port", PORTS)
def test_a_taken_port_is_one_sentence(stack: Stack, port: str) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # we hold the port ourselves, without listening
        other.bind(("127.0.0.1", int(stack.env[port])))
        other.listen()
        refused = stack.run("up")
    assert_refused(refused, f"port {stack.env[port]}", port, f"pid {os.getpid()}")
    assert not (stack.home / "batches.db").exists()
    stack.assert_nothing_left([])


def test_two_services_on_one_port_are_refused(stack: Stack) -> None:
    refused = stack.run("up", API_PORT=stack.env["DAGSTER_PORT"])
    assert_refused(refused, "API_PORT", "DAGSTER_PORT")


def test_a_missing_catalogue_is_one_sentence(stack: Stack, tmp_path: Path) -> None:
    refused = stack.run("up", MODELS_FILE=str(tmp_path / "none.yaml"), ENGINE_URL="")
    assert_refused(refused, str(tmp_path / "none.yaml"))


def test_a_missing_engine_environment_is_one_sentence(stack: Stack, tmp_path: Path) -> None:
    refused = stack.run("up", ENGINE_URL="", ENGINE_PYTHON=str(tmp_path / "python"))
    assert_refused(refused, str(tmp_path / "python"), "make setup", "ENGINE_URL")


def test_a_detached_up_that_cannot_start_says_why(stack: Stack, tmp_path: Path) -> None:
    refused = stack.run("up", "--detach", MODELS_FILE=str(tmp_path / "none.yaml"), ENGINE_URL="")
    assert_refused(refused, str(tmp_path / "none.yaml"))


def test_a_state_folder_that_cannot_be_written_is_one_sentence(stack: Stack) -> None:
    stack.home.write_text("a file is in the way")
    assert_refused(stack.run("up"), str(stack.home), "VLLM_BATCH_HOME")
    stack.home.unlink()


def test_a_wrong_setting_is_one_sentence(stack: Stack) -> None:
    refused = stack.run("up", API_PORT="many")
    assert refused.returncode == 2
    assert refused.stderr.count("vllm-batch: ") == 1
    assert "API_PORT" in refused.stderr


def assert_refused(refused: subprocess.CompletedProcess[str], *words: str) -> None:
    assert refused.returncode == 1, refused.stderr
    assert refused.stderr.count("vllm-batch: ") == 1
    assert "Traceback" not in refused.stderr
    assert all(word in refused.stderr for word in words), refused.stderr
