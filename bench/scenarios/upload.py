"""`upload`: POST /v1/files against `dd conv=fsync` on the same disk, and the API's memory as the files grow."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.api_process import ApiProcess, copy_with_dd, running_api
from bench.dataset import write_models, write_sized_file
from bench.figures import Figure, Result, Target, collect
from bench.plan import Plan
from bench.rss import peak_of
from bench.terminal import say

MEGABYTE = 1_000_000
SHARE = Target(0.60, at_least=True)
GROWTH = Target(50.0)


def measure_upload(plan: Plan) -> Sequence[Result]:
    """The API and dd take turns with the same file; then one API process takes files of rising size."""
    models = write_models(plan.folder / "upload-models.yaml", "simulated")
    rate_file = write_sized_file(plan.folder / "rate.jsonl", plan.sizes.upload * MEGABYTE)
    with running_api(plan.folder / "upload-rate", models) as api:
        api.upload(write_sized_file(plan.folder / "warm.jsonl", MEGABYTE))
        rows = [_compare(api, rate_file, number) for number in range(plan.runs)]
    rate_file.unlink()
    with running_api(plan.folder / "upload-memory", models) as api:
        peaks = [_peak_after(api, plan.folder, size) for size in sorted(plan.sizes.upload_memory)]
    return [_result(rows, peaks, plan)]


def _compare(api: ApiProcess, path: Path, number: int) -> dict[str, Any]:
    """One repetition of both sides. Every second one begins with dd."""
    seconds: dict[str, float] = {}
    for side in ("api", "dd") if number % 2 == 0 else ("dd", "api"):
        os.sync()  # neither side pays for what the other one left
        seconds[side] = api.upload(path) if side == "api" else copy_with_dd(path, path.with_suffix(".copy"))
        api.forget_uploads()
    megabytes = path.stat().st_size / MEGABYTE
    row = {f"{side}_mbps": megabytes / taken for side, taken in seconds.items()}
    say(f"upload: {row['api_mbps']:.0f} MB/s, dd {row['dd_mbps']:.0f} MB/s")
    return {"megabytes": megabytes, **row, "share": row["api_mbps"] / row["dd_mbps"]}


def _peak_after(api: ApiProcess, folder: Path, size: int) -> dict[str, Any]:
    path = write_sized_file(folder / f"upload-{size}.jsonl", size * MEGABYTE)
    seconds = api.upload(path)
    path.unlink()
    api.forget_uploads()
    row = {"megabytes": size, "peak": peak_of(api.pid), "seconds": seconds}
    say(f"upload: {size} MB, API peak {row['peak']:.0f} MB")
    return row


def _result(rows: Sequence[dict[str, Any]], peaks: Sequence[dict[str, Any]], plan: Plan) -> Result:
    size, least, most = f"{plan.sizes.upload} MB", peaks[0], peaks[-1]
    growth = f"API process: growth of the peak from {least['megabytes']} to {most['megabytes']} MB"
    return Result(
        name="upload",
        title="POST /v1/files against dd conv=fsync on the same disk",
        figures=(
            collect(f"{size}: ours / dd", "x", rows, "share", SHARE),
            collect(f"{size}: ours", "MB/s", rows, "api_mbps"),
            collect(f"{size}: dd conv=fsync", "MB/s", rows, "dd_mbps"),
            Figure(growth, "MB", (most["peak"] - least["peak"],), GROWTH),
            *(collect(f"API process: peak after {row['megabytes']} MB", "MB", [row], "peak") for row in peaks),
        ),
        setup={"upload_mb": plan.sizes.upload, "memory_mb": list(plan.sizes.upload_memory), "dd": "bs=1M conv=fsync"},
        raw=(*rows, *peaks),
        notes=(
            "From connect to the 200, which comes after the fsync, of one multipart request over loopback; the client "
            "sends from the page cache with sendfile. dd copies the same file. `sync` before each.",
            "Ours parses the form, takes the SHA-256 and keeps a record besides; client and server share the cores.",
            "Peers: none publishes a rate. comet-ml/opik#8273 reports 161 MiB of peak memory for an upload of 228 MiB "
            "after a mend, 1,087 MiB before it; AIBrix #2379 36.3 s for 100 lines of 1 KiB into a remote store.",
        ),
    )
