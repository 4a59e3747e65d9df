"""Properties of what reads bytes from outside: no input crashes it, and what it lets pass is what was sent."""

import io

import msgspec
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_batch_dagster.core.answers import as_json_object, read_answer
from vllm_batch_dagster.core.journal import JournalRecord, encode_record, read_records
from vllm_batch_dagster.core.lines import CheckedLine, LineChecker, read_request
from vllm_batch_dagster.core.merging import read_custom_id, render_answer

CHAT = "/v1/chat/completions"
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
LINES = st.fixed_dictionaries(
    {},
    optional={
        "custom_id": st.text(max_size=5) | JSON,
        "method": st.just("POST") | JSON,
        "url": st.just(CHAT) | JSON,
        "body": st.fixed_dictionaries(
            {},
            optional={"model": st.sampled_from(["tiny", "other", "none"]), "messages": JSON, "stream": JSON, "x": JSON},
        )
        | JSON,
    },
)
OBJECTS = st.dictionaries(st.text(max_size=5), JSON, max_size=3)


def checker() -> LineChecker:
    return LineChecker(CHAT, {"tiny": "tiny", "other": "other"}.get)


@given(st.binary(max_size=80) | st.builds(msgspec.json.encode, LINES))
@example(b"[" * 100_000)
@example(b'{"custom_id":"\\ud800","method":"POST","url":"/v1/chat/completions","body":{"model":"tiny","messages":[]}}')
@example(b'{"custom_id":"a","method":"POST","url":"/v1/chat/completions","body":{"model":"tiny","messages":[1e999]}}')
def test_every_line_is_checked_or_has_an_error(raw: bytes) -> None:
    found = checker().check(raw, 3)
    if isinstance(found, CheckedLine):
        assert read_request(raw) == (found.custom_id, found.body)
        assert found.body in raw
        assert found.model in ("tiny", "other")
    else:
        assert found
        assert all(error.line == 3 and error.code and error.message for error in found)


@given(st.binary(max_size=80) | st.builds(msgspec.json.encode, JSON), st.sampled_from([200, 400, 404, 500, 503]))
@example(b"[" * 100_000, 200)
@example(b'{"detail":{"a":1}}', 404)
@example(b'{\n"a":\r\n1}', 200)
def test_every_body_can_stand_in_an_output_line(body: bytes, status: int) -> None:
    made = as_json_object(body, status)
    record = JournalRecord(0, "a", status == 200, status, "r", 0.1, 1, msgspec.Raw(made))
    line = render_answer("batch_1", record)
    assert line.count(b"\n") == 1
    response = msgspec.json.decode(line)["response"]
    assert isinstance(response["body"], dict)
    assert status < 400 or isinstance(response["body"]["error"], dict)


@given(st.builds(msgspec.json.encode, OBJECTS))
def test_an_object_on_one_line_is_never_touched(body: bytes) -> None:
    assert as_json_object(body, 200) is body


@given(st.binary(max_size=60) | st.builds(msgspec.json.encode, JSON))
@example(b'{"status":"\xff"}')
@example(b'{"error":{"type":"\xff"}}')
@example(b"[" * 100_000)
def test_facts_can_be_read_of_anything(body: bytes) -> None:
    facts = read_answer(body)
    assert facts.usage.total_tokens == facts.usage.input_tokens + facts.usage.output_tokens


@given(st.text(max_size=20), OBJECTS)
def test_any_custom_id_comes_out_of_its_line(custom_id: str, body: dict[str, object]) -> None:
    encoded = msgspec.json.encode(body)
    record = JournalRecord(0, custom_id, True, 200, "r", 0.1, 1, msgspec.Raw(encoded))
    line = render_answer("batch_1", record)
    assert read_custom_id(line) == custom_id
    assert b'"body":' + encoded + b"}" in line


BODIES = (
    b"{}",
    b'{"a" : 1e2, "a":1.50}',
    '{"text":"caf\u00e9 \\u00e9 \\n"}'.encode(),
    b'{"choices":[' + b"0," * 50 + b"0]}",
)
RECORDS = st.lists(
    st.builds(
        JournalRecord,
        line=st.integers(0, 2**40),
        custom_id=st.text(max_size=8),
        ok=st.booleans(),
        status=st.integers(100, 599),
        request_id=st.just("req-1"),
        seconds=st.sampled_from([0.0, 0.25, 1e6]),
        tries=st.integers(1, 99),
        body=st.sampled_from(BODIES).map(msgspec.Raw),
    ),
    max_size=4,
)


def plain(record: JournalRecord) -> tuple[object, ...]:
    fields = (getattr(record, name) for name in record.__struct_fields__)
    return tuple(bytes(value) if isinstance(value, msgspec.Raw) else value for value in fields)


@given(RECORDS, st.data())
def test_a_journal_cut_at_any_byte_reads_as_a_prefix(records: list[JournalRecord], data: st.DataObject) -> None:
    parts = [encode_record(record) for record in records]
    whole = b"".join(parts)
    cut = data.draw(st.integers(0, len(whole)))
    read = list(read_records(io.BytesIO(whole[:cut])))
    complete = sum(1 for number in range(len(parts)) if sum(map(len, parts[: number + 1])) <= cut)
    assert [plain(placed.record) for placed in read] == [plain(record) for record in records[:complete]]
