"""What the engine will read of a request: texts, a conversation, or token ids, and how much it may write.

Any endpoint's line or body in, `Prompts` out. The pre-flight counts them; nothing here is sent.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

_OUTPUT_LIMITS = ("max_completion_tokens", "max_output_tokens", "max_tokens")
_TEXT_FIELDS = ("prompt", "input", "text_1", "text_2", "query", "queries", "documents", "items", "data_1", "data_2")
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

Message = Mapping[str, Any]


class _Line(msgspec.Struct):
    custom_id: str
    body: msgspec.Raw


class _Named(msgspec.Struct):
    model: str


_line = msgspec.json.Decoder(_Line)
_named = msgspec.json.Decoder(_Named)


@dataclass(frozen=True, slots=True)
class RoughLine:
    """The parts of a request line that can be read, whether validation will like it or not."""

    custom_id: str
    model: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Prompts:
    """`texts` and `id_counts` (prompts that came as token ids) are read one by one; `messages` are one conversation.

    `max_tokens` None: the body sets no limit. `is_truncated`: the engine cuts what is too long. `has_media`: pictures
    or sound, whose tokens nobody can count without the model.
    """

    texts: tuple[str, ...] = ()
    id_counts: tuple[int, ...] = ()
    messages: tuple[Message, ...] = ()
    tools: tuple[Any, ...] = ()
    max_tokens: int | None = None
    is_truncated: bool = False
    has_media: bool = False


@dataclass(frozen=True, slots=True)
class PromptLength:
    """Input tokens of a request: of all its prompts, and of the `longest` one, which must fit the context."""

    tokens: int
    longest: int


class TokenCounter(Protocol):
    """Counts the input tokens of requests for one model. `method` says how, in a sentence; `is_exact`: as it does."""

    @property
    def method(self) -> str: ...
    @property
    def is_exact(self) -> bool: ...

    def count(self, prompts: Prompts) -> PromptLength: ...


def read_line(raw: bytes) -> RoughLine | None:
    """Return what stands in a line; None when it is no request."""
    try:
        line = _line.decode(raw)
        return RoughLine(line.custom_id, _named.decode(line.body).model, bytes(line.body))
    except _UNREADABLE:
        return None


def read_prompts(body: bytes) -> Prompts | None:
    """Return what `body` asks for; None when it cannot be read."""
    try:
        fields = msgspec.json.decode(body, type=dict[str, Any])
    except _UNREADABLE:
        return None
    messages = tuple(_messages(fields))
    values = [fields[name] for name in _TEXT_FIELDS if name in fields and not _is_conversation(fields[name])]
    texts = [text for value in values for text in _texts(value)]
    limits = [fields[name] for name in _OUTPUT_LIMITS if isinstance(fields.get(name), int)]
    tools = fields.get("tools")
    return Prompts(
        texts=tuple(texts),
        id_counts=tuple(count for value in values for count in _id_counts(value)),
        messages=tuple({**message, "content": _text_of(message.get("content"))} for message in messages),
        tools=tuple(tools) if isinstance(tools, list) else (),
        max_tokens=limits[0] if limits else None,
        is_truncated=fields.get("truncate_prompt_tokens") is not None,
        has_media=any(_has_media(message.get("content")) for message in messages),
    )


def _messages(fields: Mapping[str, Any]) -> Iterator[Message]:
    if isinstance(instructions := fields.get("instructions"), str):
        yield {"role": "system", "content": instructions}
        if isinstance(fields.get("input"), str):
            yield {"role": "user", "content": fields["input"]}
    for name in ("messages", "input"):
        if isinstance(fields.get(name), list) and _is_conversation(fields[name]):
            yield from (message for message in fields[name] if isinstance(message, dict))


def _is_conversation(value: object) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict) and "role" in item for item in value)


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        yield from (item for item in value if isinstance(item, str))


def _id_counts(value: object) -> Iterator[int]:
    if not isinstance(value, list):
        return
    if value and all(isinstance(item, int) for item in value):
        yield len(value)
    yield from (len(item) for item in value if isinstance(item, list))


def _text_of(content: object) -> str:
    """Return a message's text; parts are joined as vLLM joins them for a template that wants a string."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    return "\n".join(part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))


def _has_media(content: object) -> bool:
    if not isinstance(content, Sequence) or isinstance(content, str):
        return False
    return any(isinstance(part, dict) and "text" not in part for part in content)
