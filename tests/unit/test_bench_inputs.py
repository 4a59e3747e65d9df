"""What the measuring program sends and compares: input files, engine arguments, latency parts, choice of scenarios."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import rss
from bench.__main__ import choose
from bench.baseline import BenchFailed, baseline_environment, check_same_engine, engine_arguments, show_arguments
from bench.dagster_runs import Run
from bench.dataset import read_bodies, write_chat_file, write_padded_file, write_prompt, write_sized_file
from bench.polling import percentile
from bench.rss import peak_of, read_peak, watch_peak
from bench.scenarios import ONLY_BY_NAME, SCENARIOS
from bench.scenarios.latency import PARTS, split_parts
from bench.scenarios.orchestration import per_chunk
from bench.seeding import seed_batches
from bench.trips import Trip
from vllm_batch_dagster.adapters.engine.config import EngineConfig
from vllm_batch_dagster.adapters.engine.launch import Launch, plan_launch
from vllm_batch_dagster.composition import build_store
from vllm_batch_dagster.core.lines import read_request
from vllm_batch_dagster.core.models import Model
from vllm_batch_dagster.core.states import BatchStatus
from vllm_batch_dagster.settings import Settings


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    config = EngineConfig(folder=tmp_path, python="/engine/python", extra_args="--seed 7")
    model = Model("tiny", "/models/tiny", args=("--load-format", "dummy"))
    return plan_launch(config, "cpu", model, is_local=True)


def test_an_input_file_is_the_same_every_time_and_every_line_differs(tmp_path: Path) -> None:
    first, second = (write_chat_file(tmp_path / name, 300, "tiny", 32) for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    assert len(set(read_bodies(first))) == 300


def test_an_input_line_is_a_request_of_the_product(tmp_path: Path) -> None:
    line = write_chat_file(tmp_path / "a", 1, "tiny", 32).read_bytes().splitlines()[0]
    custom_id, body = read_request(line)
    assert custom_id == "line-000000"
    assert json.loads(body) == json.loads(read_bodies(tmp_path / "a")[0])
    assert json.loads(body)["max_tokens"] == 32


def test_a_prompt_is_shorter_than_a_block_of_the_prefix_cache() -> None:
    # A token has at least one character; the chat template adds some 30 tokens.
    assert max(len(write_prompt(number)) for number in range(5000)) < 98


def test_the_baseline_gets_the_arguments_of_the_engine_and_none_of_http(launch: Launch) -> None:
    arguments = engine_arguments(launch.argv)
    assert arguments[:2] == ("--model", "/models/tiny")
    assert " ".join(arguments[2:]) == (
        "--served-model-name tiny --scheduling-policy priority --max-model-len auto --max-num-seqs 128 "
        "--enforce-eager --load-format dummy --seed 7"
    )


def test_the_report_shows_no_folder_of_the_machine(launch: Launch) -> None:
    assert show_arguments(engine_arguments(launch.argv)).startswith("--model tiny --served-model-name tiny ")


def test_the_same_engine_on_another_port_is_the_same(launch: Launch) -> None:
    check_same_engine(launch, launch.at(1234))


def test_another_engine_argument_is_noticed(launch: Launch) -> None:
    with pytest.raises(BenchFailed, match="the engines differ"):
        check_same_engine(launch, [*launch.at(1234), "--dtype", "float32"])


def test_the_baseline_has_the_environment_of_our_launch(launch: Launch) -> None:
    environment = baseline_environment({"PATH": "/bin", "PYTHONPATH": "/ours", "VIRTUAL_ENV": "/ours"}, launch.env)
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "2"
    assert environment["PATH"] == "/bin"
    assert not {"PYTHONPATH", "VIRTUAL_ENV"} & set(environment)


def test_the_parts_of_a_latency_add_up_to_the_whole() -> None:
    trip = Trip("batch_1", submitted=0.0, accepted=1.0, completed=60.0, readable=61.0)
    runs = {
        "validate_batch": Run("validate_batch", "SUCCESS", 3.0, 6.0, 7.0),
        "infer_chunks": Run("infer_chunks", "SUCCESS", 9.0, 12.0, 41.0),
        "finalize_batch": Run("finalize_batch", "SUCCESS", 45.0, 50.0, 65.0),
    }
    parts = split_parts(trip, runs, (13.0, 40.0))
    assert list(parts) == list(PARTS)
    assert list(parts.values()) == [1, 2, 3, 1, 2, 3, 1, 27, 1, 4, 5, 10]
    assert sum(parts.values()) == trip.completed - trip.submitted


def test_a_further_chunk_costs_the_difference_over_the_chunks_added() -> None:
    one = [{"wall": 10.0, "chunk_count": 1}, {"wall": 12.0, "chunk_count": 1}]
    many = [{"wall": 17.0, "chunk_count": 8}, {"wall": 12.0, "chunk_count": 8}]
    assert per_chunk("wall", "further", one, many).values == (1.0, 0.0)


def test_peak_memory_is_read_in_megabytes() -> None:
    assert read_peak("Name:\tpython\nVmPeak:\t  900000 kB\nVmHWM:\t  131072 kB\nVmRSS:\t 1 kB\n") == 128.0


def test_a_process_that_has_ended_has_no_peak() -> None:
    with pytest.raises(ValueError, match="no VmHWM"):
        read_peak("Name:\tpython\nState:\tZ (zombie)\n")


def test_the_peak_of_a_child_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of this process, which the kernel counts as the child's too until it is another program."""
    held = bytes(range(256)) * (1 << 20)
    child = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert child.stdin is not None
    let_go = child.stdin.close

    def look(pid: int) -> float:
        """Let it end once it has been seen."""
        if (peak := peak_of(pid)) > 1:
            let_go()
        return peak

    monkeypatch.setattr(rss, "peak_of", look)
    assert 1 < watch_peak(child) < len(held) / 2**20


def test_two_names_of_one_measurement_run_it_once() -> None:
    assert choose(["cold", "warm"]) == [SCENARIOS["cold"]]
    assert choose([]) == list(dict.fromkeys(SCENARIOS[name] for name in SCENARIOS if name not in ONLY_BY_NAME))


def test_what_takes_long_is_measured_only_by_its_name() -> None:
    assert {SCENARIOS[name] for name in ONLY_BY_NAME}.isdisjoint(choose([]))
    assert choose(["million", "journal"]) == [SCENARIOS["million"], SCENARIOS["journal"]]


def test_an_unknown_scenario_ends_with_the_names_that_there_are() -> None:
    with pytest.raises(SystemExit, match="no scenario hot; there are: cold, warm"):
        choose(["cold", "hot"])


@pytest.mark.parametrize("line_bytes", [300, 4000])
def test_a_padded_file_has_lines_of_one_length_that_pass_validation(tmp_path: Path, line_bytes: int) -> None:
    lines = write_padded_file(tmp_path / "a", 12, "tiny", line_bytes).read_bytes().splitlines(keepends=True)
    assert [len(line) for line in lines] == [line_bytes] * 12
    assert [read_request(line)[0] for line in lines] == [f"line-{number:07d}" for number in range(12)]


def test_a_sized_file_has_its_size_to_the_byte(tmp_path: Path) -> None:
    assert write_sized_file(tmp_path / "a", 1_234_567).stat().st_size == 1_234_567


def test_a_percentile_is_a_value_that_was_measured() -> None:
    values = [float(number) for number in range(1, 201)]
    assert [percentile(values, share) for share in (0.5, 0.99, 1)] == [100.0, 198.0, 200.0]
    assert percentile([7.0], 0.99) == 7.0
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


def test_seeded_batches_are_what_the_api_lists(tmp_path: Path) -> None:
    settings = Settings(_env_file=None, vllm_batch_home=tmp_path / "home", postgres_host="")
    seed_batches(settings, 30)
    page = build_store(settings).batches.list(limit=20)
    assert (len(page.data), page.has_more) == (20, True)
    assert {batch.status for batch in page.data} == {BatchStatus.COMPLETED}
    assert [batch.created_at for batch in page.data] == sorted((b.created_at for b in page.data), reverse=True)
