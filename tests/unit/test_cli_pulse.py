"""Services that hang: how long they are silent, and that the supervisor starts them again."""

import os
import signal
import socket

import grpc
import pytest

from tests.unit.small_services import SLEEP, Signals, Stack, run_until, service
from vllm_batch_dagster.cli import readiness
from vllm_batch_dagster.cli import supervisor as supervisor_module
from vllm_batch_dagster.cli.pulse import Pulse
from vllm_batch_dagster.cli.readiness import can_start_runs

pytestmark = pytest.mark.timeout(180)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_silence_counts_from_the_first_missing_answer() -> None:
    clock, answer = Clock(), [True]
    pulse = Pulse(lambda: [("web", lambda: answer[0])], 60, clock)
    pulse.ask_all()
    assert pulse.silent_seconds("web") == 0
    answer[0] = False
    pulse.ask_all()
    clock.now += 30
    pulse.ask_all()
    assert pulse.silent_seconds("web") == 30
    assert pulse.silent_seconds("api") == 0
    answer[0] = True
    pulse.ask_all()
    assert pulse.silent_seconds("web") == 0


def test_a_new_life_begins_without_silence() -> None:
    clock = Clock()
    pulse = Pulse(lambda: [("web", lambda: False)], 60, clock)
    pulse.ask_all()
    clock.now += 30
    pulse.forget("web")
    assert pulse.silent_seconds("web") == 0


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "PULSE_SECONDS", 0.02)
    monkeypatch.setattr(supervisor_module, "SILENT_SECONDS", 0.2)


@pytest.mark.usefixtures("hasty")
def test_a_service_that_hangs_is_killed_and_started_again(stack: Stack, signals: Signals) -> None:
    hanging: list[int] = []
    supervisor = stack(service("web", SLEEP, alive=lambda: supervisor.records()[0].pid not in hanging))

    def hang_once() -> bool:
        if supervisor.is_ready and not hanging:
            pid = supervisor.records()[0].pid
            os.kill(pid, signal.SIGSTOP)
            hanging.append(pid)  # last: from here on it may be killed at any moment
        return supervisor.is_ready and supervisor.records()[0].pid not in hanging

    assert run_until(supervisor, signals, hang_once) is None
    said = supervisor._log.recent("web")
    assert any("has not answered" in line for line in said)
    assert any("was killed by SIGKILL; it is started again" in line for line in said)


class Server:
    """A gRPC server that answers the question about a run, or does not."""

    def __init__(self, *, knows: bool) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self.asked: list[bytes] = []
        self._server = grpc.server(ThreadPoolExecutor(2))
        if knows:
            handler = grpc.unary_unary_rpc_method_handler(self._answer)
            self._server.add_generic_rpc_handlers(
                [grpc.method_handlers_generic_handler("api.DagsterApi", {"CanCancelExecution": handler})]
            )
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def _answer(self, question: bytes, _context: grpc.ServicerContext) -> bytes:
        self.asked.append(question)
        return b""

    def stop(self) -> None:
        self._server.stop(0)


@pytest.mark.parametrize("knows", [True, False])
def test_the_code_server_is_asked_as_dagster_asks(knows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from dagster._grpc.__generated__ import dagster_api_pb2
    from dagster._grpc.types import CanCancelExecutionRequest
    from dagster._serdes import deserialize_value

    monkeypatch.setattr(readiness, "PULSE_TIMEOUT_SECONDS", 120.0)
    server = Server(knows=knows)
    try:
        assert can_start_runs("127.0.0.1", server.port) is knows
    finally:
        server.stop()
    for question in server.asked:
        message = dagster_api_pb2.CanCancelExecutionRequest.FromString(question)
        request = deserialize_value(message.serialized_can_cancel_execution_request, CanCancelExecutionRequest)
        assert request.run_id == "pulse"
    assert bool(server.asked) is knows


def test_a_server_that_never_answers_cannot_start_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "PULSE_TIMEOUT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert not can_start_runs("127.0.0.1", silent.getsockname()[1])


def test_a_server_that_is_not_there_cannot_start_runs() -> None:
    assert not can_start_runs("127.0.0.1", 1)
