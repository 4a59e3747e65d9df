"""Decides on which of the engine's endpoints a line runs. Called when a line is sent.

Every line runs on its own url, but one: Parasail's client sends rerank requests (`query` and `documents`) to
`/v1/score`, whose requests in vLLM have two sides (`text_1`/`text_2` and the like) and no `query`. Such a line runs on
`/v1/rerank`: its body stays the user's bytes, and its answer has `results` and honours `top_n`.
"""

import msgspec

SCORE, RERANK = "/v1/score", "/v1/rerank"
_ABSENT = msgspec.Raw(b"")
_NOTHING = (b"", b"null")


class _Head(msgspec.Struct):
    query: msgspec.Raw = _ABSENT
    documents: msgspec.Raw = _ABSENT


_head = msgspec.json.Decoder(_Head)


def route_request(url: str, body: bytes) -> str:
    """Return the engine's endpoint for a checked line."""
    return RERANK if url == SCORE and _is_rerank(body) else url


def _is_rerank(body: bytes) -> bool:
    head = _head.decode(body)
    return bytes(head.query) not in _NOTHING and bytes(head.documents) not in _NOTHING
