"""Made-up answers in vLLM's shape. Pure: the same request gives the same bytes, and every answer says `simulated`.

In: an endpoint and a decoded body. Out: a status and a JSON-able body, with the tokens that it "cost".
"""

import hashlib
import struct
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Body = Mapping[str, Any]
Json = dict[str, Any]

FINGERPRINT = "simulated"
CREATED = 1_700_000_000  # A constant, so that equal requests have equal answers.
DEFAULT_MAX_TOKENS = 16
EMBEDDING_SIZE = 8
_WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "haven")


class Refused(Exception):
    """The request gets a 4xx in vLLM's shape (engine report 5.1)."""

    def __init__(self, status: int, message: str, kind: str = "BadRequestError", param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": status}}


@dataclass(frozen=True, slots=True)
class Limits:
    """What the server serves: its names, the first of which is echoed, and its context length in words."""

    models: tuple[str, ...]
    max_model_len: int


@dataclass(frozen=True, slots=True)
class Answer:
    """A 200 body and its tokens."""

    body: Json
    prompt_tokens: int
    output_tokens: int = 0


def answer_request(endpoint: str, body: Body, request_id: str, limits: Limits) -> Answer:
    """Return the answer to one request. Raises Refused."""
    build = _BUILDERS.get(endpoint)
    if build is None:
        raise Refused(404, "Not Found", "NotFoundError")
    _check(body, limits)
    return build(body, request_id, limits)


def _check(body: Body, limits: Limits) -> None:
    model = body.get("model", limits.models[0])
    if model not in limits.models:
        served = ", ".join(limits.models)
        raise Refused(404, f"The model `{model}` does not exist. Valid aliases: {served}.", "NotFoundError", "model")
    if body.get("stream"):
        raise Refused(400, "The simulated engine does not stream.", param="stream")
    temperature = body.get("temperature")
    if isinstance(temperature, int | float) and temperature < 0:
        raise Refused(400, f"temperature must be non-negative, got {temperature}.", param="temperature")


def _count(prompt: object, limits: Limits) -> int:
    tokens = max(1, len(_text_of(prompt).split()))
    if tokens > limits.max_model_len:
        raise Refused(
            400,
            f"This model's maximum context length is {limits.max_model_len} tokens. However, your prompt contains at "
            f"least {tokens} input tokens. Please reduce the length of the prompt.",
            param="input_tokens",
        )
    return tokens


def _text_of(value: object) -> str:
    match value:
        case str():
            return value
        case Mapping():
            return " ".join(_text_of(value[key]) for key in ("content", "text", "input_text") if key in value)
        case list() | tuple():
            return " ".join(_text_of(item) for item in value)
        case _:
            return "" if value is None else str(value)


def _digest(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()


def _write(prompt: object, body: Body, index: int, limit: object) -> tuple[str, int, str]:
    """Return a text, its tokens and its finish reason; longer than `limit` is cut with `length`."""
    seed = _digest(_text_of(prompt), body.get("seed"), body.get("temperature"), index)
    words = ["simulated", seed.hex()[:8], *(_WORDS[byte % len(_WORDS)] for byte in seed[: 4 + seed[0] % 12])]
    allowed = limit if isinstance(limit, int) and limit > 0 else DEFAULT_MAX_TOKENS
    reason = "length" if len(words) > allowed else "stop"
    kept = words[:allowed]
    return " ".join(kept), len(kept), reason


def _usage(prompt_tokens: int, output_tokens: int) -> Json:
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + output_tokens,
        "completion_tokens": output_tokens,
        "prompt_tokens_details": None,
    }


def _choices(prompt: object, body: Body, limit: object, shape: Callable[[str], Json]) -> tuple[list[Json], int]:
    choices, tokens = [], 0
    for index in range(int(body.get("n") or 1)):
        text, count, reason = _write(prompt, body, index, limit)
        tokens += count
        choices.append({"index": index, **shape(text), "logprobs": None, "finish_reason": reason, "stop_reason": None})
    return choices, tokens


def _chat(body: Body, request_id: str, limits: Limits) -> Answer:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "messages must be a list with at least one message.", param="messages")
    prompt = _count(messages, limits)
    limit = body.get("max_completion_tokens", body.get("max_tokens"))
    choices, tokens = _choices(
        messages, body, limit, lambda text: {"message": {"role": "assistant", "content": text, "tool_calls": []}}
    )
    return Answer(
        _envelope("chatcmpl-", "chat.completion", request_id, limits, choices, prompt, tokens), prompt, tokens
    )


def _completion(body: Body, request_id: str, limits: Limits) -> Answer:
    prompt = _count(body.get("prompt"), limits)
    choices, tokens = _choices(body.get("prompt"), body, body.get("max_tokens"), lambda text: {"text": text})
    return Answer(_envelope("cmpl-", "text_completion", request_id, limits, choices, prompt, tokens), prompt, tokens)


def _envelope(
    prefix: str, kind: str, request_id: str, limits: Limits, choices: list[Json], prompt: int, tokens: int
) -> Json:
    return {
        "id": prefix + request_id,
        "object": kind,
        "created": CREATED,
        "model": limits.models[0],
        "choices": choices,
        "system_fingerprint": FINGERPRINT,
        "usage": _usage(prompt, tokens),
    }


def _responses(body: Body, request_id: str, limits: Limits) -> Answer:
    prompt = _count(body.get("input"), limits)
    text, tokens, reason = _write(body.get("input"), body, 0, body.get("max_output_tokens"))
    status = "incomplete" if reason == "length" else "completed"
    part: Json = {"type": "output_text", "text": text, "annotations": [], "logprobs": None}
    message = {"id": f"msg_{request_id}", "type": "message", "role": "assistant", "status": status, "content": [part]}
    usage = {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + tokens,
    }
    content = {
        "id": f"resp_{request_id}",
        "object": "response",
        "created_at": CREATED,
        "model": limits.models[0],
        "status": status,
        "incomplete_details": {"reason": "max_output_tokens"} if reason == "length" else None,
        "output": [message],
        "usage": usage,
        "system_fingerprint": FINGERPRINT,
    }
    return Answer(content, prompt, tokens)


def _embeddings(body: Body, request_id: str, limits: Limits) -> Answer:
    given = body.get("input")
    if not given:
        raise Refused(400, "input must not be empty.", param="input")
    texts = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    tokens = sum(_count(text, limits) for text in texts)
    as_base64 = body.get("encoding_format") == "base64"
    data = [
        {"index": index, "object": "embedding", "embedding": _embed(text, as_base64=as_base64)}
        for index, text in enumerate(texts)
    ]
    return Answer(_list("embd-", request_id, limits, {"object": "list", "data": data}, tokens), tokens)


def _embed(text: object, *, as_base64: bool) -> list[float] | str:
    numbers = [byte / 255 for byte in _digest(_text_of(text))[:EMBEDDING_SIZE]]
    length = sum(number * number for number in numbers) ** 0.5 or 1.0
    vector = [number / length for number in numbers]
    return b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode() if as_base64 else vector


def _score(body: Body, request_id: str, limits: Limits) -> Answer:
    left, right = _as_list(_first(body, "text_1", "queries")), _as_list(_first(body, "text_2", "documents"))
    if len(left) not in (1, len(right)):
        raise Refused(400, "text_1 must be one text or as many as text_2.", param="text_1")
    pairs = [(left[0] if len(left) == 1 else left[index], other) for index, other in enumerate(right)]
    tokens = sum(_count([*pair], limits) for pair in pairs)
    data = [{"index": index, "object": "score", "score": _similarity(*pair)} for index, pair in enumerate(pairs)]
    return Answer(_list("score-", request_id, limits, {"object": "list", "data": data}, tokens), tokens)


def _rerank(body: Body, request_id: str, limits: Limits) -> Answer:
    documents = _as_list(_first(body, "documents"))
    tokens = sum(_count([body.get("query"), document], limits) for document in documents)
    results = [
        {
            "index": index,
            "document": {"text": _text_of(document), "multi_modal": None},
            "relevance_score": _similarity(body.get("query"), document),
        }
        for index, document in enumerate(documents)
    ]
    results.sort(key=lambda result: -float(str(result["relevance_score"])))
    top = body.get("top_n") or len(results)
    return Answer(_list("rerank-", request_id, limits, {"results": results[:top]}, tokens), tokens)


def _first(body: Body, *names: str) -> object:
    for name in names:
        if body.get(name):
            return body[name]
    raise Refused(400, f"{names[0]} is missing.", param=names[0])


def _as_list(value: object) -> list[object]:
    return list(value) if isinstance(value, list) else [value]


def _similarity(left: object, right: object) -> float:
    ours, theirs = set(_text_of(left).lower().split()), set(_text_of(right).lower().split())
    return len(ours & theirs) / (len(ours | theirs) or 1)


def _list(prefix: str, request_id: str, limits: Limits, content: Json, tokens: int) -> Json:
    return {
        "id": prefix + request_id,
        "created": CREATED,
        "model": limits.models[0],
        **content,
        "usage": _usage(tokens, 0),
        "system_fingerprint": FINGERPRINT,
    }


_BUILDERS: Mapping[str, Callable[[Body, str, Limits], Answer]] = {
    "/v1/chat/completions": _chat,
    "/v1/completions": _completion,
    "/v1/responses": _responses,
    "/v1/embeddings": _embeddings,
    "/v1/score": _score,
    "/v1/rerank": _rerank,
}
