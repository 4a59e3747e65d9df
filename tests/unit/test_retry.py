"""What an answer means for its line: the borders of the table that test_answers.py begins, and delays."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_batch_dagster.core.ports import EngineAnswer
from vllm_batch_dagster.core.retry import RetryPolicy, Verdict, judge


def verdict(status: int, body: bytes = b"{}") -> Verdict:
    return judge(EngineAnswer(status, body, "r", 0.1))


@pytest.mark.parametrize("status", [200, 201, 204])
def test_other_2xx_are_successes_too(status: int) -> None:
    assert verdict(status) is Verdict.SUCCESS


@pytest.mark.parametrize("status", [301, 400, 401, 404, 409, 413, 422])
def test_what_the_request_itself_causes_is_final(status: int) -> None:
    assert verdict(status) is Verdict.REJECTED


@pytest.mark.parametrize("status", [408, 425, 500, 502, 504])
def test_what_may_pass_is_a_fault(status: int) -> None:
    assert verdict(status) is Verdict.FAULT


@pytest.mark.parametrize("reasons", [["abort"], ["stop", "abort"], ["error"]])
def test_one_aborted_choice_spoils_the_answer(reasons: list[str]) -> None:
    choices = ",".join(f'{{"finish_reason":"{reason}"}}' for reason in reasons)
    assert verdict(200, f'{{"choices":[{choices}]}}'.encode()) is Verdict.FAULT


@pytest.mark.parametrize("words", [b"EngineCore", b"EngineDead", b"after shutdown"])
def test_the_words_of_a_dead_engine_count_only_in_a_server_error(words: bytes) -> None:
    body = b'{"error":{"message":"why does %b matter"}}' % words
    assert verdict(500, body) is Verdict.ENGINE_DOWN
    assert verdict(400, body) is Verdict.REJECTED
    assert verdict(200, body) is Verdict.SUCCESS
    assert verdict(503, body) is Verdict.BUSY


def test_an_answer_that_talks_of_aborting_is_no_abort() -> None:
    assert verdict(200, b'{"choices":[{"finish_reason":"stop","text":"abort"}]}') is Verdict.SUCCESS


@given(st.integers(100, 599), st.binary(max_size=60) | st.sampled_from([b"[" * 5000, b'{"status":"\xff"}', b"null"]))
def test_every_answer_has_a_verdict(status: int, body: bytes) -> None:
    assert verdict(status, body) in Verdict


@given(st.floats(0, 60), st.floats(0, 600), st.integers(1, 10_000))
def test_delays_never_shrink_and_never_pass_the_cap(base: float, cap: float, tries: int) -> None:
    policy = RetryPolicy(base=base, cap=cap)
    assert 0 <= policy.delay(tries) <= policy.delay(tries + 1) <= cap


def test_a_line_is_spent_at_its_limit() -> None:
    policy = RetryPolicy(line_attempts=4)
    assert [policy.is_spent(faults) for faults in (0, 3, 4, 5)] == [False, False, True, True]


@pytest.mark.parametrize("body", [b"", b"<html>please log in</html>", b"[1, 2]", b'{"cut": ', b"null"])
def test_a_success_without_a_json_object_is_no_answer_of_an_engine(body: bytes) -> None:
    assert verdict(200, body) is Verdict.FAULT
