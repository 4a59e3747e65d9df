"""One request line: what passes, and which error each kind of bad line gets (contract D.4, checklist 51-57)."""

import msgspec
import pytest

from vllm_batch_dagster.core.lines import CheckedLine, LineChecker, read_request

CHAT = "/v1/chat/completions"
BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def checker(endpoint: str = CHAT) -> LineChecker:
    return LineChecker(endpoint, {"m": "m", "alias": "m", "other": "other"}.get)


def line(**changes: object) -> bytes:
    whole = {"custom_id": "a", "method": "POST", "url": CHAT, "body": BODY} | changes
    return msgspec.json.encode({key: value for key, value in whole.items() if value is not None})


def errors_of(raw: bytes) -> list[tuple[str, str | None, int | None]]:
    found = checker().check(raw, 7)
    assert not isinstance(found, CheckedLine)
    return [(error.code, error.param, error.line) for error in found]


def test_good_line_keeps_the_body_byte_for_byte() -> None:
    body = b'{"model" : "m",  "messages":[], "x":1e2}'
    raw = b'{"custom_id":"a", "method":"POST","url":"/v1/chat/completions","body": ' + body + b"}"
    found = checker().check(raw, 1)
    assert isinstance(found, CheckedLine)
    assert found.body == b'{"model" : "m",  "messages":[], "x":1e2}'
    assert read_request(raw) == ("a", found.body)


@pytest.mark.parametrize("raw", [b'{"custom_id": "a"', b"nonsense", b"[1]", b"\xff\xfe", b"\xef\xbb\xbf" + line()])
def test_broken_json(raw: bytes) -> None:
    assert errors_of(raw) == [("invalid_json_line", None, 7)]


@pytest.mark.parametrize("name", ["custom_id", "method", "url", "body"])
def test_missing_field(name: str) -> None:
    assert errors_of(line(**{name: None})) == [("missing_required_parameter", name, 7)]


def test_two_missing_fields_are_both_named() -> None:
    assert [param for _code, param, _line in errors_of(line(method=None, url=None))] == ["method", "url"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"url": "/v1/embeddings"}, ("invalid_url", "url")),
        ({"method": "GET"}, ("invalid_method", "method")),
        ({"custom_id": 5}, ("invalid_type", "custom_id")),
        ({"body": "text"}, ("invalid_type", "body")),
        ({"body": {"messages": []}}, ("invalid_request", "body.model")),
        ({"body": BODY | {"model": "gpt-9"}}, ("model_not_found", "body.model")),
        ({"body": BODY | {"stream": True}}, ("streaming_unsupported", "body.stream")),
        ({"body": {"model": "m"}}, ("invalid_request", "body.messages")),
    ],
)
def test_bad_value(changes: dict[str, object], expected: tuple[str, str]) -> None:
    assert errors_of(line(**changes)) == [(*expected, 7)]


def test_second_model_is_refused_and_an_alias_is_not() -> None:
    one = checker()
    assert isinstance(one.check(line(), 1), CheckedLine)
    assert isinstance(one.check(line(body=BODY | {"model": "alias"}), 2), CheckedLine)
    found = one.check(line(body=BODY | {"model": "other"}), 3)
    assert not isinstance(found, CheckedLine)
    assert [(error.code, error.line) for error in found] == [("mismatched_model", 3)]


def test_other_endpoints_need_no_messages() -> None:
    raw = line(url="/v1/embeddings", body={"model": "m", "input": "x"})
    assert isinstance(checker("/v1/embeddings").check(raw, 1), CheckedLine)
