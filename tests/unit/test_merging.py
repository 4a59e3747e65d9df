"""Rendered lines have OpenAI's shape, and the walk over merged files finds every kind of damage."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from vllm_batch_dagster.core.journal import JournalRecord
from vllm_batch_dagster.core.lines import hash_custom_id
from vllm_batch_dagster.core.merging import reconcile_files, render_answer, render_unanswered

BODY = b'{"id":"chatcmpl-1", "n" : 1.50}'


def test_an_answer_is_spliced_in_byte_for_byte() -> None:
    record = JournalRecord(3, 'he said "hi" ✓', True, 200, "req-3", 0.1, 1, msgspec.Raw(BODY))
    rendered = render_answer("batch_1", record)
    assert BODY in rendered
    assert rendered.endswith(b"\n")
    assert rendered.count(b"\n") == 1
    line = msgspec.json.decode(rendered)
    assert sorted(line) == ["custom_id", "error", "id", "response"]
    assert sorted(line["response"]) == ["body", "request_id", "status_code"]
    assert line["id"].startswith("batch_req_")
    assert line["custom_id"] == 'he said "hi" ✓'
    assert line["error"] is None


def test_an_unanswered_line_says_why() -> None:
    line = msgspec.json.decode(render_unanswered("batch_1", 0, "a", "batch_cancelled"))
    assert line["response"] is None
    assert line["error"]["code"] == "batch_cancelled"
    assert "cancelled" in line["error"]["message"]


def rows(ids: list[str]) -> list[bytes]:
    return [render_unanswered("batch_1", number, name, "x") for number, name in enumerate(ids)]


IDS = st.lists(st.text(min_size=1, max_size=5), unique=True, min_size=1, max_size=20)


@given(IDS, st.data())
def test_a_right_split_is_accepted(ids: list[str], data: st.DataObject) -> None:
    good = data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    output = [name for name, ok in zip(ids, good, strict=True) if ok]
    errors = [name for name, ok in zip(ids, good, strict=True) if not ok]
    tally = reconcile_files([hash_custom_id(name) for name in ids], rows(output), rows(errors))
    assert tally.problem == ""
    assert (tally.output_lines, tally.error_lines) == (len(output), len(errors))


@given(IDS, st.data())
def test_a_lost_doubled_or_foreign_line_is_found(ids: list[str], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(ids) - 1))
    damaged = {
        "lost": ids[:place] + ids[place + 1 :],
        "doubled": ids[: place + 1] + ids[place:],
        "foreign": [*ids, "foreign line"],
    }[data.draw(st.sampled_from(["lost", "doubled", "foreign"]))]
    tally = reconcile_files([hash_custom_id(name) for name in ids], rows(damaged), [])
    assert tally.problem
