"""Lines as rows, what PostgreSQL can store, and how rows are grouped: pure parts of the handlers that fill tables."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.frames import BYTES_PER_GROUP, MOST_ROWS_PER_GROUP, plan_groups
from handlers.postgres_values import fit_json, fit_text
from handlers.rows import ResultRow, read_row, read_rows
from handlers.testing import answered, refused, three_kinds, unanswered

TEXTS = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from('\x00\\u0"'))


def row_of(line: dict[str, Any], model: str | None = None) -> ResultRow:
    return read_row(json.dumps(line).encode(), model)


def with_body(body: Any, status: int = 200) -> dict[str, Any]:
    return {**answered("a"), "response": {"status_code": status, "request_id": "req_1", "body": body}}


class TestRows:
    def test_a_chat_answer(self) -> None:
        row = row_of(answered("a", "yes"))
        assert (row.custom_id, row.status, row.status_code, row.model) == ("a", "answered", 200, "tiny")
        assert (row.answer, row.finish_reason, row.input_tokens, row.output_tokens) == ("yes", "stop", 3, 5)
        assert row.response == json.dumps(answered("a", "yes")["response"]["body"]).encode()
        assert (row.error, row.error_code, row.error_message) == (None, None, None)

    def test_a_completion_a_response_and_a_tool_call(self) -> None:
        assert row_of(with_body({"choices": [{"text": "so", "finish_reason": "length"}]})).answer == "so"
        content = [{"type": "output_text", "text": "so"}]
        said = row_of(with_body({"status": "completed", "output": [{"type": "message", "content": content}]}))
        assert (said.answer, said.finish_reason) == ("so", "completed")
        call = {"message": {"content": None, "tool_calls": []}, "finish_reason": "tool_calls"}
        assert row_of(with_body({"choices": [call]})).answer is None

    def test_an_embedding_has_no_answer_and_the_model_of_the_batch(self) -> None:
        row = row_of(with_body({"object": "list", "data": [{"embedding": [0.5]}]}), "minilm")
        assert (row.answer, row.finish_reason, row.model, row.input_tokens) == (None, None, "minilm", None)
        assert row.response is not None

    def test_lines_of_the_error_file(self) -> None:
        row = row_of(refused("c"))
        assert (row.status, row.status_code, row.error_code, row.error_message) == ("failed", 400, "400", "too long")
        assert row.error == json.dumps(refused("c")["response"]["body"]["error"]).encode()
        row = row_of(unanswered("d"))
        assert (row.status, row.status_code, row.error_code, row.response) == ("failed", None, "batch_expired", None)

    @pytest.mark.parametrize("body", ["a text", 7, ["a"], {"error": "a text"}, {"error": None}, {"model": 3}])
    def test_a_body_in_a_shape_of_its_own_is_kept(self, body: Any) -> None:
        row = row_of(with_body(body, 500), "tiny")
        assert (row.status, row.model, row.error_code) == ("failed", "tiny", "error")
        assert row.response == json.dumps(body).encode()
        assert row.error is not None

    def test_what_is_no_result_is_refused(self) -> None:
        with pytest.raises(msgspec.DecodeError):
            read_row(b'{"response": null}')

    def test_both_files_are_read(self) -> None:
        assert [row.custom_id for row in read_rows(three_kinds("batch_1").delivery())] == ["a", "b", "c", "d"]


class TestPostgresValues:
    @given(TEXTS)
    def test_only_nul_is_replaced(self, text: str) -> None:
        assert fit_text(text) == text.replace("\x00", "\ufffd")
        value = {"said": text, text: [text]}
        kept = {"said": fit_text(text), fit_text(text): [fit_text(text)]}
        assert json.loads(fit_json(json.dumps(value).encode()) or "") == kept

    def test_nothing_stays_nothing(self) -> None:
        assert (fit_text(None), fit_json(None)) == (None, None)


class TestGroups:
    @given(st.lists(st.sampled_from([10, 900, 1_000_000, 5_000_000]), max_size=200))
    def test_no_group_is_too_large_unless_a_line_is(self, sizes: list[int]) -> None:
        rows = plan_groups(sizes)
        groups = [sum(sizes[start : start + rows]) for start in range(0, len(sizes), rows)]
        assert 1 <= rows <= MOST_ROWS_PER_GROUP
        assert rows == 1 or max(groups, default=0) <= BYTES_PER_GROUP

    def test_short_lines_make_large_groups(self) -> None:
        assert plan_groups([100] * 20_000) == MOST_ROWS_PER_GROUP
        assert plan_groups([]) == MOST_ROWS_PER_GROUP
