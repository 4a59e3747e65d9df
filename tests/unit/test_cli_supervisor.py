"""The supervisor with small services: order, readiness, deaths, stubbornness, and nothing left behind."""

import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.unit.small_services import PATIENCE_SECONDS, SLEEP, Signals, Stack, nothing_runs, run_until, service
from vllm_batch_dagster.cli import supervisor as supervisor_module
from vllm_batch_dagster.cli.group_log import GroupLog
from vllm_batch_dagster.cli.processes import is_alive, wait_until
from vllm_batch_dagster.cli.services import Service
from vllm_batch_dagster.cli.signals import StopSignals
from vllm_batch_dagster.cli.supervisor import Supervisor, describe_exit

pytestmark = pytest.mark.timeout(180)

# Says whether SIGINT and SIGTERM act by default.
HANDLERS = (
    "import signal, time;"
    "print(signal.getsignal(2) is signal.default_int_handler, signal.getsignal(15) is signal.SIG_DFL, flush=True);"
    "time.sleep(120)"
)
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + SLEEP
# Leaves a child of its own group behind when it ends.
WITH_CHILD = (
    "import subprocess, sys, time;"
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(120)']); print('hello', flush=True);"
    "time.sleep(120)"
)


def test_services_start_when_those_before_them_are_ready(stack: Stack, signals: Signals) -> None:
    seen: list[tuple[str, ...]] = []
    opened = threading.Event()

    def note(supervisor: Supervisor) -> None:
        seen.append(tuple(record.name for record in supervisor.records()))

    supervisor = stack(
        service("code", SLEEP, ready=lambda _: opened.is_set()),
        service("web", SLEEP, "code"),
        service("api", SLEEP),
        on_change=note,
    )
    threading.Timer(0.5, opened.set).start()
    assert run_until(supervisor, signals, lambda: supervisor.is_ready) is None
    assert seen[-1] == ("code", "api", "web")
    assert supervisor.is_ready


def test_readiness_gets_the_time_of_the_start(stack: Stack, signals: Signals) -> None:
    times = []
    began = time.time()
    supervisor = stack(service("api", SLEEP, ready=lambda since: bool(times.append(since) or True)))
    run_until(supervisor, signals, lambda: supervisor.is_ready)
    assert began <= times[0] <= time.time()


def test_a_death_before_it_was_ever_ready_is_told_with_the_last_words(stack: Stack, log: GroupLog) -> None:
    dying = service("web", "print('cannot go on'); raise SystemExit(3)", ready=lambda _: False)
    failure = stack(service("api", SLEEP), dying).run()
    assert failure is not None
    assert "the service web ended with exit code 3" in failure
    assert "cannot go on" in failure
    assert str(log.path("web")) in failure


def test_a_service_that_never_gets_ready_is_told(stack: Stack, log: GroupLog, monkeypatch: pytest.MonkeyPatch) -> None:
    def never_ready(_since: float) -> bool:
        if log.recent("web") == ["hello"]:  # else its time might be over before it can say anything
            monkeypatch.setattr(supervisor_module, "READY_SECONDS", 0.5)
        return False

    failure = stack(service("web", SLEEP, ready=never_ready)).run()
    assert failure is not None
    assert "the service web was not ready after 0.5 s" in failure
    assert "hello" in failure


def test_stopping_goes_in_reverse_order(stack: Stack, signals: Signals, tmp_path: Path) -> None:
    def sayer(name: str) -> str:
        return (
            "import signal, sys, time, pathlib;"
            f"f = pathlib.Path({str(tmp_path / 'order')!r});"
            f"signal.signal(15, lambda *_: (f.open('a').write('{name} '), sys.exit()));"
            "print('hello', flush=True); time.sleep(120)"
        )

    supervisor = stack(*(service(name, sayer(name)) for name in ("code", "web", "api")))
    run_until(supervisor, signals, lambda: all(_said_hello(supervisor, name) for name in ("code", "web", "api")))
    supervisor.stop()
    assert (tmp_path / "order").read_text().split() == ["api", "web", "code"]


def _said_hello(supervisor: Supervisor, name: str) -> bool:
    return supervisor._log.recent(name) == ["hello"]


@pytest.mark.parametrize("code", [SLEEP, WITH_CHILD])
def test_nothing_is_left_after_a_stop(stack: Stack, signals: Signals, tmp_path: Path, code: str) -> None:
    supervisor = stack(service("api", code), service("web", code))
    run_until(supervisor, signals, lambda: _said_hello(supervisor, "api") and _said_hello(supervisor, "web"))
    supervisor.stop()
    assert nothing_runs(tmp_path)


def test_a_stubborn_service_is_killed(
    stack: Stack, signals: Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "SERVICE_GRACE_SECONDS", 0.3)
    supervisor = stack(service("api", STUBBORN))
    run_until(supervisor, signals, lambda: _said_hello(supervisor, "api"))
    supervisor.stop()
    assert nothing_runs(tmp_path)


def test_a_second_signal_does_not_wait(
    stack: Stack, signals: Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "SERVICE_GRACE_SECONDS", 3600)  # a stop that waits would outlast the test
    supervisor = stack(service("api", STUBBORN))
    run_until(supervisor, signals, lambda: _said_hello(supervisor, "api"))
    signals.raise_one()
    supervisor.stop()
    assert nothing_runs(tmp_path)


def test_runs_are_ended_before_the_code_server_that_waits_for_them(
    stack: Stack, signals: Signals, tmp_path: Path
) -> None:
    script = tmp_path / "server.py"
    script.write_text(
        "import multiprocessing, signal, sys, time\n"
        "def end(*_):\n"
        "    worker.join()\n"
        "    print('worker ended with', worker.exitcode, flush=True)\n"
        "    sys.exit()\n"
        "if __name__ == '__main__':\n"
        "    worker = multiprocessing.get_context('spawn').Process(target=time.sleep, args=(120,))\n"
        "    worker.start()\n"
        "    signal.signal(signal.SIGTERM, end)\n"
        "    print('hello', flush=True)\n"
        "    time.sleep(120)\n"
    )
    supervisor = stack(Service("code", (str(script),), "green", (), lambda _: True))
    run_until(supervisor, signals, lambda: _said_hello(supervisor, "code"))
    supervisor.stop()
    assert nothing_runs(tmp_path)
    wait_until(lambda: len(supervisor._log.recent("code")) > 1, PATIENCE_SECONDS)
    assert f"worker ended with {-signal.SIGTERM}" in supervisor._log.recent("code")


def test_children_get_default_signals_from_a_parent_that_ignores_them(tmp_path: Path) -> None:
    """`vllm-batch up &` in a script starts us with SIGINT ignored; Dagster would then ignore SIGTERM."""
    code = f"""
import sys
from pathlib import Path
from vllm_batch_dagster.cli.group_log import GroupLog
from vllm_batch_dagster.cli.services import Service
from vllm_batch_dagster.cli.signals import StopSignals
from vllm_batch_dagster.cli.supervisor import Supervisor
import os, threading, time
signals = StopSignals()
signals.install()
log = GroupLog(Path({str(tmp_path)!r}), None, {{}})
supervisor = Supervisor((Service("api", ("-c", {HANDLERS!r}), "green", (), lambda _: True),), os.environ, log, signals,
                        lambda _: None)
def end():
    while not log.recent("api"):
        time.sleep(0.05)
    os.kill(os.getpid(), 2)
threading.Thread(target=end).start()
print(supervisor.run())
supervisor.stop()
print(log.recent("api")[0])
"""
    ignoring = subprocess.run(
        [sys.executable, "-c", code],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert ignoring.stdout.splitlines() == ["None", "True True"], ignoring.stderr


def test_a_service_does_not_outlive_a_killed_supervisor(tmp_path: Path) -> None:
    code = f"""
import os, sys, time
sys.argv = ["x"]
from vllm_batch_dagster.cli.services import Service, command_line
import subprocess
p = subprocess.Popen(command_line(Service("api", ("-c", {SLEEP!r}), "green", (), lambda _: True)),
                     start_new_session=True, stdout=subprocess.PIPE)
p.stdout.readline()
print(p.pid, flush=True)
time.sleep(120)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.communicate()
    assert wait_until(lambda: not is_alive(child), PATIENCE_SECONDS)


@pytest.mark.parametrize(
    ("code", "words"),
    [(0, "ended with exit code 0"), (3, "exit code 3"), (-9, "killed by SIGKILL"), (-99, "killed by signal 99")],
)
def test_exits_in_words(code: int, words: str) -> None:
    assert words in describe_exit(code)


def test_signals_are_counted_and_nohup_is_respected() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signals = StopSignals()
        signals.install()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert (signals.is_stopping, signals.is_hurried) == (False, False)
        signal.raise_signal(signal.SIGTERM)
        assert (signals.is_stopping, signals.is_hurried) == (True, False)
        signal.raise_signal(signal.SIGINT)
        assert (signals.is_stopping, signals.is_hurried) == (True, True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_socket_is_closed_in_children(stack: Stack, signals: Signals) -> None:
    """A listener of ours that a service inherits would keep its port taken."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        supervisor = stack(service("api", SLEEP))
        run_until(supervisor, signals, lambda: _said_hello(supervisor, "api"))
        child = psutil.Process(supervisor.records()[0].pid)
        assert [c for c in child.net_connections("tcp") if c.status == psutil.CONN_LISTEN] == []
