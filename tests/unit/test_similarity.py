"""Texts that say almost the same as an earlier one."""

from hypothesis import given
from hypothesis import strategies as st

from vllm_batch_dagster.core.similarity import NearDuplicates, resemblance, sketch

WORDS = st.lists(st.sampled_from([f"w{number}" for number in range(40)]), max_size=60).map(" ".join)


def runs(text: str) -> set[str]:
    words = text.split()
    return {" ".join(words[at : at + 3]) for at in range(max(1, len(words) - 2))} if words else set()


def text_of(start: int, count: int) -> str:
    return " ".join(f"word{number}" for number in range(start, start + count))


@given(WORDS, WORDS)
def test_of_short_texts_the_share_is_exact(one: str, other: str) -> None:
    union = runs(one) | runs(other)
    if len(union) <= 64:
        expected = len(runs(one) & runs(other)) / len(union) if union else 1.0
        assert resemblance(sketch(one), sketch(other)) == expected


def test_of_long_texts_the_share_is_about_right() -> None:
    one, other = text_of(0, 1000), text_of(250, 1000)  # 750 of 1250 in common
    assert abs(resemblance(sketch(one), sketch(other)) - 0.6) < 0.15


@given(st.text())
def test_a_text_is_its_own_duplicate(text: str) -> None:
    near = NearDuplicates(0.9)
    assert not near.seen(text)
    assert near.seen(text)


def test_case_space_and_punctuation_do_not_matter_and_other_words_do() -> None:
    near = NearDuplicates(0.8)
    base = text_of(0, 50)
    assert not near.seen(base)
    assert near.seen(base.upper().replace(" ", ",  "))
    assert near.seen(f"{base} more")
    assert not near.seen(f"{base} {text_of(100, 50)}")
    assert not near.seen(text_of(200, 50))


def test_only_what_was_kept_is_remembered_and_only_the_window_of_it() -> None:
    near = NearDuplicates(0.9, window=2)
    texts = [text_of(number * 100, 20) for number in range(3)]
    assert [near.seen(text) for text in texts] == [False] * 3
    assert near.seen(texts[2])
    assert not near.seen(texts[0])
    assert len(near._kept) == len(near._order) == 2
    assert len(near._by_hash) == 8


def test_texts_without_words_are_alike() -> None:
    near = NearDuplicates(0.9)
    assert not near.seen("?!")
    assert near.seen("")
