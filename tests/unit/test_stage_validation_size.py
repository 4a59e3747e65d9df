"""Validation holds one line at a time: its memory does not follow the size of the file."""

import gc
import tracemalloc

from tests.unit.conftest import CHAT, Rig
from vllm_batch_dagster.core.states import BatchStatus

LINES = 100_000
PEAK_BYTES = 4 << 20  # the index's write buffer (1 MiB), the bit table (512 KiB), a few thousand suspects


def test_a_file_of_100_000_lines_in_bounded_memory(rig: Rig) -> None:
    pad = "x" * 60
    content = "".join(
        f'{{"custom_id":"request-{number}","method":"POST","url":"{CHAT}",'
        f'"body":{{"model":"tiny","messages":[{{"role":"user","content":"{pad}"}}]}}}}\n'
        for number in range(LINES)
    ).encode()
    batch_id, size = rig.create(rig.upload(content)), len(content)
    del content
    gc.collect()
    tracemalloc.start(1)
    try:
        report = rig.validate(batch_id, chunk_size=5000)
        _now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size > 3 * PEAK_BYTES  # else the bound says nothing
    assert peak < PEAK_BYTES
    assert (report.lines, len(report.chunks), report.errors) == (LINES, 20, ())
    assert rig.batch(batch_id).status is BatchStatus.IN_PROGRESS
