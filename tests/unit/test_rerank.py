"""Where a line runs: on its own url, but for Parasail's rerank requests (checklist 71)."""

import msgspec
import pytest

from vllm_batch_dagster.core.rerank import route_request

SCORE, RERANK = "/v1/score", "/v1/rerank"


@pytest.mark.parametrize(
    ("body", "endpoint"),
    [
        ({"model": "m", "text_1": "a", "text_2": ["b", "c"]}, SCORE),
        ({"model": "m", "queries": "a", "documents": ["b"]}, SCORE),
        ({"model": "m", "query": "a", "documents": ["b", "c"], "top_n": 1}, RERANK),
        ({"model": "m", "query": "a", "documents": ["b"], "truncate_prompt_tokens": 8, "priority": 0}, RERANK),
        ({"model": "m", "query": "a"}, SCORE),
        ({"model": "m", "query": "a", "documents": None}, SCORE),
        ({"model": "m", "query": None, "documents": ["b"]}, SCORE),
    ],
)
def test_a_query_with_documents_is_a_rerank_request(body: dict[str, object], endpoint: str) -> None:
    assert route_request(SCORE, msgspec.json.encode(body)) == endpoint


@pytest.mark.parametrize("url", ["/v1/chat/completions", "/v1/embeddings", RERANK])
def test_other_urls_are_never_changed(url: str) -> None:
    assert route_request(url, b'{"model":"m","query":"a","documents":["b"]}') == url
