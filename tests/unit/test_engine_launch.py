"""How the memory settings of a rung become a command line, and what the machine says of its memory."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_batch_dagster.adapters.engine import hardware
from vllm_batch_dagster.adapters.engine.config import Device, EngineConfig
from vllm_batch_dagster.adapters.engine.launch import Launch, plan_launch
from vllm_batch_dagster.core.ladder import Rung
from vllm_batch_dagster.core.models import Model


def plan(tmp_path: Path, device: Device, *args: str, task: str = "generate", extra: str = "") -> Launch:
    config = EngineConfig(folder=tmp_path, python="/engine/python", extra_args=extra)
    model = Model("tiny", "/models/tiny", task="embed" if task == "embed" else "generate", args=args)
    return plan_launch(config, device, model, is_local=True)


def test_the_top_rung_is_what_is_configured(tmp_path: Path) -> None:
    assert plan(tmp_path, "cuda").top == Rung(256, 8192, 0.92)
    assert plan(tmp_path, "cpu").top == Rung(128, cpu_kvcache_gib=2, enforce_eager=True)


def test_arguments_of_the_model_and_of_the_operator_count(tmp_path: Path) -> None:
    launch = plan(
        tmp_path,
        "cuda",
        *("--max-num-seqs", "64", "--enforce-eager", "--gpu_memory_utilization=0.5"),
        extra="--max-num-batched-tokens=4096",
    )
    assert launch.top == Rung(64, 4096, 0.5, enforce_eager=True)
    assert launch.highest_share == 0.5, "somebody wants the rest"


def test_a_value_that_only_vllm_can_read_is_left_alone(tmp_path: Path) -> None:
    assert plan(tmp_path, "cuda", "--max-num-batched-tokens", "8k").top.max_num_batched_tokens == 0


def test_the_top_rung_changes_nothing_and_a_lower_one_wins(tmp_path: Path) -> None:
    launch = plan(tmp_path, "cuda")
    plain = launch.at(8001, launch.top)
    lower = launch.at(8001, replace(launch.top, max_num_seqs=128, gpu_memory_utilization=0.88, enforce_eager=True))
    assert "{port}" not in " ".join(plain)
    assert lower == [
        *plain,
        *("--max-num-seqs", "128", "--gpu-memory-utilization", "0.88", "--enforce-eager"),
    ]


def test_the_cache_of_a_cpu_is_in_the_environment(tmp_path: Path) -> None:
    launch = plan(tmp_path, "cpu")
    larger = replace(launch.top, cpu_kvcache_gib=5)
    assert launch.at(8001, larger) == launch.at(8001, launch.top)
    assert (launch.env_at(launch.top), launch.env_at(larger)["VLLM_CPU_KVCACHE_SPACE"]) == (launch.env, "5")


@pytest.mark.parametrize(("args", "is_stated"), [((), False), (("auto",), False), (("-1",), False), (("4096",), True)])
def test_a_stated_context_is_known(tmp_path: Path, args: tuple[str, ...], is_stated: bool) -> None:
    options = ("--max-model-len", *args) if args else ()
    assert plan(tmp_path, "cuda", *options).states_context is is_stated


def test_a_pooling_model_keeps_its_step(tmp_path: Path) -> None:
    assert plan(tmp_path, "cuda", task="embed").keeps_tokens
    assert not plan(tmp_path, "cuda").keeps_tokens


def nvidia(monkeypatch: pytest.MonkeyPatch, listing: str, code: int = 0) -> hardware.Hardware:
    """Look at a machine whose nvidia-smi says `listing`."""
    monkeypatch.setattr("shutil.which", lambda _name: "/usr/bin/nvidia-smi")
    answer = SimpleNamespace(returncode=code, stdout=listing)
    monkeypatch.setattr("subprocess.run", lambda *_args, **_settings: answer)
    return hardware.look_at_hardware("cuda")


def test_the_fullest_card_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    found = nvidia(monkeypatch, "NVIDIA L4, 550.54, 23034, 20000\nNVIDIA L4, 550.54, 23034, 11517\n")
    assert found.identity == "NVIDIA L4, driver 550.54, 23034 MiB; NVIDIA L4, driver 550.54, 23034 MiB"
    assert found.free_share == 0.5


@pytest.mark.parametrize(("listing", "code"), [("", 9), ("NVIDIA L4, 550.54, [N/A], [N/A]\n", 0), ("nonsense", 0)])
def test_a_card_that_does_not_say_is_unknown(monkeypatch: pytest.MonkeyPatch, listing: str, code: int) -> None:
    assert nvidia(monkeypatch, listing, code).free_share is None


def test_a_cpu_is_known_by_its_memory() -> None:
    found = hardware.look_at_hardware("cpu")
    assert found.identity.startswith("cpu, ")
    assert found.free_share is None
    assert found.host_free_gib > 0
