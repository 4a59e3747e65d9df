"""vLLM's own batch runner on the same file, with the engine arguments and the environment of our own launch."""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from bench.errors import BenchFailed
from vllm_batch_dagster.adapters.engine.config import EngineConfig, resolve_device
from vllm_batch_dagster.adapters.engine.launch import Launch, plan_launch
from vllm_batch_dagster.composition import build_catalog
from vllm_batch_dagster.settings import Settings

_LONGEST_SECONDS = 1800
_BEGINS, _ENDS = "Reading batch from", "Writing outputs to"

# Options of `vllm serve` that are about HTTP and not about the engine, and how many values each has.
_SERVER_ONLY = {
    "--host": 1,
    "--port": 1,
    "--shutdown-timeout": 1,
    "--enable-request-id-headers": 0,
    "--enable-server-load-tracking": 0,
    "--disable-uvicorn-access-log": 0,
}


@dataclass(frozen=True, slots=True)
class Baseline:
    """One run of `run-batch`. Seconds: the whole process, its start to the answers, reading the file to the answers."""

    wall: float
    until_answers: float
    inference: float


def plan_baseline(settings: Settings, model_name: str) -> Launch:
    """Return how our product starts the model. Raises BenchFailed for a model that is not in the catalogue."""
    model = build_catalog(settings).find(model_name)
    if model is None:
        raise BenchFailed(f"{model_name} is not in {settings.catalogue_path}: run `make setup`")
    is_local = Path(model.path).is_dir()
    if is_local:
        model = replace(model, path=str(Path(model.path).absolute()))
    config = EngineConfig(
        folder=settings.engine_folder,
        python=settings.engine_python,
        extra_args=settings.engine_args,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        cpu_kvcache_gib=settings.cpu_kvcache_gib,
    )
    return plan_launch(config, resolve_device(settings.engine_device), model, is_local=is_local)


def engine_arguments(serve: Sequence[str]) -> tuple[str, ...]:
    """Return the engine's arguments of a `vllm serve PATH ...` command line: `--model PATH` and what is not HTTP's."""
    path, *options = serve[serve.index("serve") + 1 :]
    kept: list[str] = ["--model", path]
    skip = 0
    for option in options:
        if skip:
            skip -= 1
        elif option in _SERVER_ONLY:
            skip = _SERVER_ONLY[option]
        else:
            kept.append(option)
    return tuple(kept)


def show_arguments(arguments: Iterable[str]) -> str:
    """Return them for the report, without the folders of this machine."""
    return " ".join(Path(word).name if word.startswith("/") else word for word in arguments)


def check_same_engine(launch: Launch, command: Sequence[str]) -> None:
    """Raises BenchFailed when our engine was started with other arguments than the baseline's."""
    ours, theirs = engine_arguments(command), engine_arguments(launch.argv)
    if ours != theirs:
        raise BenchFailed(f"the engines differ: ours {ours}, run-batch {theirs}")


def run_baseline(launch: Launch, source: Path, log: Path) -> Baseline:
    """Run `run-batch` on `source`. Raises BenchFailed unless every line has an answer."""
    output = source.with_suffix(".run-batch.jsonl")
    output.unlink(missing_ok=True)
    command = [*launch.argv[: launch.argv.index("serve")], "run-batch", "-i", str(source), "-o", str(output)]
    began = time.monotonic()
    process = subprocess.Popen(
        [*command, *engine_arguments(launch.argv)],
        env=baseline_environment(os.environ, launch.env),
        cwd=source.parent,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    limit = threading.Timer(_LONGEST_SECONDS, _kill_group, (process.pid,))
    limit.start()
    try:
        marks = _follow(process, log)
        code = process.wait()
        wall = time.monotonic() - began
    finally:
        limit.cancel()
        _kill_group(process.pid)
    if code != 0 or len(marks) != 2:
        raise BenchFailed(f"run-batch ended with exit code {code}:\n{log.read_text(errors='replace')[-3000:]}")
    _check_answers(source, output)
    return Baseline(wall, marks[_ENDS] - began, marks[_ENDS] - marks[_BEGINS])


def baseline_environment(ours: Mapping[str, str], launch: Mapping[str, str]) -> dict[str, str]:
    """As the product's engine gets it: our interpreter's variables would reach into the engine's environment."""
    dropped = ("PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV")
    return {name: value for name, value in ours.items() if name not in dropped} | {**launch, "PYTHONUNBUFFERED": "1"}


def _follow(process: subprocess.Popen[bytes], log: Path) -> dict[str, float]:
    """Copy its output to `log`, and return when it said that inference begins and ends."""
    marks: dict[str, float] = {}
    if process.stdout is None:
        raise BenchFailed("run-batch has no output to read")
    with log.open("wb") as copy:
        for line in process.stdout:
            now = time.monotonic()
            copy.write(line)
            for mark in (_BEGINS, _ENDS):
                if mark.encode() in line:
                    marks.setdefault(mark, now)
    return marks


def _check_answers(source: Path, output: Path) -> None:
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    good = sum((answer.get("response") or {}).get("status_code") == 200 for answer in answers)
    if good != (expected := source.read_bytes().count(b"\n")):
        raise BenchFailed(f"run-batch answered {good} of {expected} lines")


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
