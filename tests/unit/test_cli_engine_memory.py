"""What `vllm-batch status` says of an engine that was started with less memory than configured."""

from dataclasses import replace
from pathlib import Path

import pytest

from vllm_batch_dagster.adapters.engine import AS_CONFIGURED, EngineStatus
from vllm_batch_dagster.cli.state_folder import StackRecord
from vllm_batch_dagster.cli.status import Overview, as_data, show

ENGINE = EngineStatus(
    model="tiny",
    pid=1,
    url="http://127.0.0.1:8000",
    state="ready",
    in_use=True,
    max_num_seqs=128,
    started_at=0.0,
    last_used=0.0,
    log=Path("engine.log"),
    command=(),
    rung="--max-num-seqs 128",
    max_model_len=2432,
)


def overview(engine: EngineStatus) -> Overview:
    record = StackRecord(pid=1, started_at=0.0, is_ready=True)
    return Overview(home=Path("home"), record=record, processes=(), engine=engine)


def test_the_rung_is_shown_when_memory_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    show(overview(ENGINE))
    assert "memory is short: --max-num-seqs 128" in " ".join(capsys.readouterr().out.split())
    show(overview(replace(ENGINE, rung=AS_CONFIGURED)))
    assert "memory is short" not in capsys.readouterr().out


def test_programs_read_it_too() -> None:
    engine = as_data(overview(ENGINE))["engine"]
    assert (engine["memory"], engine["max_num_seqs"], engine["max_model_len"]) == ("--max-num-seqs 128", 128, 2432)
    assert as_data(overview(replace(ENGINE, max_model_len=0)))["engine"]["max_model_len"] is None
