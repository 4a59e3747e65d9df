"""A chunk says with which memory settings its engine ran."""

import pytest

from tests.defs.graph import Graph, values
from vllm_batch_dagster.adapters.engine.folder import EngineFolder, EngineRecord


@pytest.mark.parametrize("words", ["--max-num-seqs 128", ""])
def test_the_rung_of_the_engine_is_shown_at_the_chunk(graph: Graph, words: str) -> None:
    folder = EngineFolder(graph.services.settings.engine_folder)
    folder.create()
    folder.write(
        EngineRecord(
            serial="one",
            fingerprint="",
            model="tiny",
            command=(),
            port=1,
            max_num_seqs=128,
            boot="",
            started_at=0.0,
            log_offset=0,
            rung_words=words,
        )
    )
    batch_id = graph.inferred()
    (shown,) = graph.shown_chunk(batch_id, 2)
    assert values(shown.metadata)["engine_memory"] == (words or "as configured")
