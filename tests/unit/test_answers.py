"""What is read of the engine's bodies, and what an answer means for its line."""

import msgspec
import pytest

from vllm_batch_dagster.core.answers import as_json_object, read_answer
from vllm_batch_dagster.core.models import Usage
from vllm_batch_dagster.core.ports import EngineAnswer
from vllm_batch_dagster.core.retry import RetryPolicy, Verdict, judge

CHAT = (
    b'{"choices":[{"index":0,"finish_reason":"stop","message":{"content":"hi"}}],'
    b'"usage":{"prompt_tokens":7,"completion_tokens":3,"total_tokens":10,"prompt_tokens_details":{"cached_tokens":4}}}'
)
RESPONSE = (
    b'{"status":"completed","output":[],"usage":{"input_tokens":5,"output_tokens":2,'
    b'"input_tokens_details":{"cached_tokens":1},"output_tokens_details":{"reasoning_tokens":1}}}'
)
ABORT = b'{"choices":[{"finish_reason":"abort"}]}'


def test_facts_of_chat_responses_and_embeddings() -> None:
    assert read_answer(CHAT).usage == Usage(7, 4, 3, 0)
    assert read_answer(CHAT).finish_reasons == ("stop",)
    assert read_answer(RESPONSE).usage == Usage(5, 1, 2, 1)
    assert read_answer(b'{"data":[],"usage":{"prompt_tokens":9,"total_tokens":9}}').usage == Usage(9, 0, 0, 0)
    assert read_answer(b"not json").usage == Usage()


@pytest.mark.parametrize(
    ("status", "body", "verdict"),
    [
        (200, CHAT, Verdict.SUCCESS),
        (200, ABORT, Verdict.FAULT),
        (400, b'{"error":{"message":"too long"}}', Verdict.REJECTED),
        (404, b'{"detail":"Not Found"}', Verdict.REJECTED),
        (429, b"{}", Verdict.BUSY),
        (503, b"{}", Verdict.BUSY),
        (500, b'{"error":{"message":"EngineCore encountered an issue"}}', Verdict.ENGINE_DOWN),
        (500, b"cannot schedule new futures after shutdown", Verdict.ENGINE_DOWN),
        (500, b'{"error":{"message":"a bug"}}', Verdict.FAULT),
        (502, b"<html>", Verdict.FAULT),
    ],
)
def test_verdicts(status: int, body: bytes, verdict: Verdict) -> None:
    assert judge(EngineAnswer(status, body, "r", 0.1)) is verdict


def test_a_json_object_on_one_line_is_not_touched() -> None:
    body = b'{"a" :1.0,  "b":"\\n"}'
    assert as_json_object(body, 200) is body


def test_a_pretty_printed_body_is_put_on_one_line() -> None:
    made = as_json_object(b'{\n  "a": "x\\ny"\r\n}', 200)
    assert b"\n" not in made
    assert msgspec.json.decode(made) == {"a": "x\ny"}


@pytest.mark.parametrize(
    ("body", "message"),
    [(b'{"detail":"Not Found"}', "Not Found"), (b"<html>oops", "<html>oops"), (b'"text"', '"text"')],
)
def test_other_error_bodies_get_openais_envelope(body: bytes, message: str) -> None:
    error = msgspec.json.decode(as_json_object(body, 404))["error"]
    assert error == {"message": message, "type": "invalid_request_error", "param": None, "code": None}


def test_delays_double_up_to_the_cap() -> None:
    policy = RetryPolicy(line_attempts=3, base=1.0, cap=5.0)
    assert [policy.delay(tries) for tries in (1, 2, 3, 4, 100)] == [1.0, 2.0, 4.0, 5.0, 5.0]
    assert [policy.is_spent(faults) for faults in (2, 3)] == [False, True]
