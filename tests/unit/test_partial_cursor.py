"""The text of a cursor: what was written is read back, and nothing else is."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_batch_dagster.core.errors import InvalidInput
from vllm_batch_dagster.core.partial import ResultCursor, read_cursor

places = st.dictionaries(st.integers(1, 50), st.integers(0, 1 << 40), min_size=1, max_size=3)
cursors = st.builds(
    lambda done, opened, refused: ResultCursor(
        frozenset(done), {index: at for index, at in opened.items() if index not in done}, refused
    ),
    st.sets(st.integers(0, 60)),
    st.dictionaries(st.integers(0, 60), places, max_size=5),
    st.integers(0, 1 << 20),
)


@given(cursors)
def test_a_cursor_survives_its_text(cursor: ResultCursor) -> None:
    assert read_cursor(str(cursor)) == cursor


def test_a_cursor_is_short_and_fits_a_url() -> None:
    cursor = ResultCursor(frozenset(range(1000)), {1000: {1: 20480, 2: 64}})
    assert str(cursor) == "v1_0-999_1000.1:20480.2:64"
    assert str(ResultCursor()) == "v1"
    assert str(ResultCursor(frozenset({0}), refused=7)) == "v1_r7_0-0"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "v2",
        "v1_",
        "v1_a",
        "v1_1",
        "v1_1-",
        "v1_1.2",
        "v1_r",
        "v1_r1x",
        "v1_1.2:",
        "v1_-1-2",
        "v1_0-99999999",
        "v1_1.1:1_",
        "v1" * 50_000,
    ],
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(InvalidInput) as refusal:
        read_cursor(text)
    assert refusal.value.param == "after"
    assert len(refusal.value.message) < 300


@given(st.text(max_size=40))
def test_no_text_crashes_the_reader(text: str) -> None:
    with suppress(InvalidInput):
        assert isinstance(read_cursor(text), ResultCursor)
