"""`up --detach`: starts an `up` in a session of its own and returns when everything is ready."""

import subprocess
import sys
import time
from pathlib import Path

import typer

from vllm_batch_dagster.cli.banner import banner
from vllm_batch_dagster.cli.console import PROGRAM, fail
from vllm_batch_dagster.cli.state_folder import read_record
from vllm_batch_dagster.settings import Settings

POLL_SECONDS = 0.2
READ_BYTES = 16 << 10


def start_detached(settings: Settings) -> int:
    """Start and wait. Returns 0 when all services are ready, 1 when `up` ended: it has said why."""
    settings.log_folder.mkdir(parents=True, exist_ok=True)
    words = settings.log_folder / "up.log"
    began = time.time()
    process = _spawn(words)
    try:
        while process.poll() is None:
            record = read_record(settings.vllm_batch_home)
            if record and record.pid == process.pid and record.is_ready:
                typer.echo("\n".join(banner(settings, time.time() - began, is_detached=True)))
                return 0
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        return fail("interrupted before everything was ready; all of it is stopped")
    return fail(last_complaint(words))


def _spawn(words: Path) -> subprocess.Popen[bytes]:
    with words.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "vllm_batch_dagster.cli", "up", "--background"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def last_complaint(words: Path) -> str:
    """Return what a detached `up` said last about itself."""
    text = words.read_bytes()[-READ_BYTES:].decode("utf-8", "replace").strip()
    _, marker, complaint = text.rpartition(f"{PROGRAM}: ")
    return complaint if marker else f"`up` ended without a word; see {words}"
