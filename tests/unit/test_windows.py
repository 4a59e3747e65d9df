"""Completion windows: OpenAI's one, and the durations that this server adds (checklist 29)."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_batch_dagster.core.creation import read_window
from vllm_batch_dagster.core.errors import InvalidInput
from vllm_batch_dagster.core.windows import PATTERN, WindowRule, window_seconds


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1m", 60), ("90m", 5_400), ("6h", 21_600), ("24h", 86_400), ("7d", 604_800), ("30d", 2_592_000)],
)
def test_a_number_and_a_unit(text: str, seconds: int) -> None:
    assert window_seconds(text, WindowRule.ANY) == seconds


@pytest.mark.parametrize(
    "text",
    [
        *("", "0m", "31d", "721h", "43201m", "24", "h", "24H", "1w", "60s", "1.5h", "-1h", "1 h", " 24h", "24h\n"),
        *("06h", "PT2H", "1h30m", "\u0661h", "99999999999999999999d"),
    ],
)
def test_what_is_no_window(text: str) -> None:
    assert window_seconds(text, WindowRule.ANY) is None
    with pytest.raises(InvalidInput, match="Supported values are: '24h', and a number with one unit") as refused:
        read_window(text, WindowRule.ANY)
    assert (refused.value.param, refused.value.code) == ("completion_window", "invalid_value")


@pytest.mark.parametrize("text", ["1h", "48h", "1440m", "1d", ""])
def test_a_server_that_does_as_openai_takes_24h_alone(text: str) -> None:
    assert window_seconds("24h", WindowRule.OPENAI) == 86_400
    assert window_seconds(text, WindowRule.OPENAI) is None


@given(st.text("0123456789mhd", max_size=7))
def test_every_window_that_is_taken_fits_the_documented_pattern(text: str) -> None:
    if (seconds := window_seconds(text, WindowRule.ANY)) is not None:
        assert re.fullmatch(PATTERN, text)
        assert 60 <= seconds <= 30 * 86_400
