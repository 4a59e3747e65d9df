"""The supervisor starts again what dies, with growing pauses, and gives up when that does not help."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.unit.small_services import SLEEP, Signals, Stack, nothing_runs, run_until, service
from vllm_batch_dagster.cli import supervisor as supervisor_module
from vllm_batch_dagster.cli.group_log import GroupLog
from vllm_batch_dagster.cli.processes import is_alive
from vllm_batch_dagster.cli.services import Service
from vllm_batch_dagster.cli.supervisor import Supervisor, pause_before

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def may_die(tmp_path: Path) -> Path:
    """A service looks at this path and lives until something is there: one that dies before it was ever ready is no
    case for a restart, and how soon the supervisor comes to ask is nobody's guess."""
    return tmp_path / "may-die"


def waits_for(path: Path) -> str:
    return f"import os, time\nwhile not os.path.exists({str(path)!r}): time.sleep(0.01)\n"


def let_die_when_ready(path: Path) -> Callable[[Supervisor], None]:
    return lambda supervisor: path.touch() if supervisor.is_ready else None


def test_a_killed_service_is_started_again(stack: Stack, signals: Signals, log: GroupLog) -> None:
    supervisor = stack(service("api", SLEEP), service("web", SLEEP))
    pids: list[dict[str, int]] = []

    def kill_one() -> bool:
        now = {record.name: record.pid for record in supervisor.records()}
        if not pids and supervisor.is_ready:
            pids.append(now)
            os.kill(now["web"], signal.SIGKILL)
        return bool(pids) and now["web"] != pids[0]["web"] and supervisor.is_ready

    assert run_until(supervisor, signals, kill_one) is None
    again = {record.name: record.pid for record in supervisor.records()}
    assert again["api"] == pids[0]["api"], "the other one is left alone"
    assert psutil.pid_exists(again["web"])
    assert any("was killed by SIGKILL; it is started again" in line for line in log.recent("web"))
    assert "ready again" in log.recent("web")


def test_the_record_is_written_again_after_a_restart(stack: Stack, signals: Signals) -> None:
    seen: list[tuple[int, bool]] = []
    supervisor = stack(
        service("api", SLEEP), on_change=lambda changed: seen.append((changed.records()[0].pid, changed.is_ready))
    )
    killed: list[int] = []

    def kill_once() -> bool:
        if supervisor.is_ready and not killed:
            killed.append(supervisor.records()[0].pid)
            os.kill(killed[0], signal.SIGKILL)
        return len(seen) > 2 and seen[-1][1] and seen[-1][0] != killed[0]

    run_until(supervisor, signals, kill_once)
    first, second = killed[0], supervisor.records()[0].pid
    assert seen == [(first, False), (first, True), (first, False), (second, False), (second, True)]


def test_a_crash_loop_ends_the_stack(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, may_die: Path
) -> None:
    monkeypatch.setattr(supervisor_module, "LONGEST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(supervisor_module, "POLL_SECONDS", 0.01)
    code = f"open({str(tmp_path / 'lives')!r}, 'a').write('x'); print('no luck')\n" + waits_for(may_die) + "exit(3)"
    services = service("api", SLEEP), service("web", code)
    failure = stack(*services, on_change=let_die_when_ready(may_die)).run()
    assert failure is not None
    assert "the service web ended with exit code 3, its death number 6 in a row, and is given up" in failure
    assert "no luck" in failure
    assert (tmp_path / "lives").read_text() == "x" * 6


def test_a_steady_life_begins_a_new_row(
    stack: Stack, signals: Signals, monkeypatch: pytest.MonkeyPatch, may_die: Path
) -> None:
    monkeypatch.setattr(supervisor_module, "LONGEST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(supervisor_module, "STEADY_SECONDS", 0.1)
    code = waits_for(may_die) + "time.sleep(0.3)"
    supervisor = stack(service("web", code), on_change=let_die_when_ready(may_die))
    lives: set[int] = set()

    def count_lives() -> bool:
        lives.update(record.pid for record in supervisor.records())
        return len(lives) > supervisor_module.MOST_RESTARTS + 2

    assert run_until(supervisor, signals, count_lives) is None


def test_a_service_that_does_not_come_back_is_killed(
    stack: Stack, signals: Signals, log: GroupLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[float] = []
    killed: list[int] = []

    def grant(seconds: float) -> None:
        monkeypatch.setattr(supervisor_module, "READY_SECONDS", seconds)

    def ready_at_first(since: float) -> bool:
        if since not in starts:
            starts.append(since)
        if len(starts) == 2:  # it was asked once, and its time is over; every other life has as long as it takes
            grant(0.0)
        return len(starts) in (1, 3)

    supervisor = stack(service("web", SLEEP, ready=ready_at_first), on_change=lambda _: grant(600.0))

    def kill_first() -> bool:
        if not killed and len(starts) == 1 and supervisor.is_ready:
            killed.append(supervisor.records()[0].pid)
            os.kill(killed[0], signal.SIGKILL)
        return len(starts) == 3 and supervisor.is_ready

    assert run_until(supervisor, signals, kill_first) is None
    assert sum("it is started again" in line for line in log.recent("web")) == 2


@pytest.mark.parametrize(("deaths", "seconds"), [(1, 0.5), (2, 1.0), (3, 2.0), (5, 8.0), (6, 15.0), (60, 15.0)])
def test_the_pause_grows_to_a_bound(deaths: int, seconds: float) -> None:
    assert pause_before(deaths) == seconds


def test_runs_of_a_dead_code_server_go_on_and_are_ended_at_the_stop(
    stack: Stack, signals: Signals, tmp_path: Path
) -> None:
    script = tmp_path / "server.py"
    script.write_text(
        "import multiprocessing, time\n"
        "if __name__ == '__main__':\n"
        "    worker = multiprocessing.get_context('spawn').Process(target=time.sleep, args=(120,))\n"
        "    worker.start()\n"
        "    print('worker', worker.pid, flush=True)\n"
        "    time.sleep(120)\n"
    )
    supervisor = stack(Service("code", (str(script),), "green", (), lambda _: True))
    workers: list[psutil.Process] = []

    def kill_once() -> bool:
        said = [line for line in supervisor._log.recent("code") if line.startswith("worker")]
        if said and not workers:
            workers.append(psutil.Process(int(said[0].split()[1])))
            os.kill(supervisor.records()[0].pid, signal.SIGKILL)
        return len(said) > 1

    run_until(supervisor, signals, kill_once)
    assert is_alive(workers[0]), "the run goes on without its code server"
    supervisor.stop()
    assert not is_alive(workers[0])
    assert nothing_runs(tmp_path)
