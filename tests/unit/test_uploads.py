"""The rules of uploads in parts (core/uploads.py)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_batch_dagster.core.errors import InvalidInput
from vllm_batch_dagster.core.uploads import (
    MAX_PART_BYTES,
    MAX_PARTS,
    MAX_UPLOAD_BYTES,
    Completion,
    PartTotals,
    Upload,
    UploadPart,
    UploadStatus,
    check_md5,
    check_pending,
    check_room,
    make_upload,
    order_parts,
    read_completion,
)

NOW = 1_800_000_000
PARAMS = {"filename": "a/b/in.jsonl", "purpose": "batch", "bytes": 12, "mime_type": "text/plain"}
UPLOAD = Upload("upload_1", "in.jsonl", "batch", 12, "text/plain", NOW, NOW + 3600)


def parts_of(*sizes: int) -> list[UploadPart]:
    return [UploadPart(f"part_{number}", "upload_1", size, NOW) for number, size in enumerate(sizes)]


def test_an_upload_is_made_of_its_parameters() -> None:
    params = {**PARAMS, "expires_after": {"anchor": "created_at", "seconds": 3600}, "unknown": 1}
    made = make_upload(params, lambda size: bytes(size), NOW, "mine")

    assert made == replace(UPLOAD, id="upload_" + "00" * 16, expires_after=3600, project_id="mine")
    assert made.is_pending


@pytest.mark.parametrize("size", [0, MAX_UPLOAD_BYTES])
def test_the_bounds_of_the_size_are_inside(size: int) -> None:
    assert make_upload({**PARAMS, "bytes": size}, lambda size: bytes(size), NOW).bytes == size


def test_an_upload_is_overdue_after_its_hour_and_only_while_it_is_pending() -> None:
    assert [UPLOAD.is_overdue(NOW + seconds) for seconds in (0, 3599.9, 3600)] == [False, False, True]
    for status in (UploadStatus.COMPLETED, UploadStatus.CANCELLED, UploadStatus.EXPIRED):
        assert not replace(UPLOAD, status=status).is_overdue(NOW + 9999)


@pytest.mark.parametrize("status", [UploadStatus.COMPLETED, UploadStatus.CANCELLED, UploadStatus.EXPIRED])
def test_what_is_closed_says_how(status: UploadStatus) -> None:
    check_pending(UPLOAD)
    with pytest.raises(InvalidInput, match=f"upload_1 is {status.value}") as refused:
        check_pending(replace(UPLOAD, status=status))
    assert refused.value.code == "upload_not_pending"


@given(sizes=st.lists(st.integers(0, 5), max_size=6), data=st.data())
def test_parts_that_add_up_come_in_the_order_that_is_asked(sizes: list[int], data: st.DataObject) -> None:
    parts = parts_of(*sizes)
    wanted = data.draw(st.permutations(parts)) if parts else []
    chosen = wanted[: data.draw(st.integers(0, len(wanted)))]
    upload = replace(UPLOAD, bytes=sum(part.bytes for part in chosen))

    assert order_parts(upload, parts, tuple(part.id for part in chosen)) == tuple(chosen)


@pytest.mark.parametrize(
    ("part_ids", "param", "code"),
    [
        (("part_0",), "part_ids", "bytes_mismatch"),
        ((), "part_ids", "bytes_mismatch"),
        (("part_0", "part_9"), "part_ids[1]", "invalid_value"),
        (("part_0", "part_1", "part_0"), "part_ids[2]", "invalid_value"),
    ],
)
def test_parts_that_make_no_file_are_refused(part_ids: tuple[str, ...], param: str, code: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        order_parts(UPLOAD, parts_of(8, 4), part_ids)
    assert (refused.value.param, refused.value.code) == (param, code)


def test_there_is_room_for_every_part_twice_but_not_for_ever() -> None:
    check_room(UPLOAD, PartTotals(MAX_PARTS - 1, 24 + MAX_PART_BYTES))
    for held in (PartTotals(MAX_PARTS, 0), PartTotals(1, 25 + MAX_PART_BYTES)):
        with pytest.raises(InvalidInput) as refused:
            check_room(UPLOAD, held)
        assert (refused.value.param, refused.value.code) == ("data", "too_many_parts")


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"part_ids": []}, Completion(())),
        ({"part_ids": ["a", "b"], "md5": None}, Completion(("a", "b"))),
        ({"part_ids": ["a"], "md5": "AB" * 16}, Completion(("a",), "ab" * 16)),
    ],
)
def test_a_completion_is_read(params: Mapping[str, Any], expected: Completion) -> None:
    assert read_completion(params) == expected


@pytest.mark.parametrize("md5", ["", "ab" * 15, "ab" * 17, "zz" * 16, "ab" * 16 + "\n"])
def test_a_checksum_that_can_be_none_is_refused(md5: str) -> None:
    with pytest.raises(InvalidInput, match="32 hexadecimal digits"):
        read_completion({"part_ids": [], "md5": md5})


def test_a_checksum_is_compared_when_there_is_one() -> None:
    check_md5(None, "00" * 16)
    check_md5("00" * 16, "00" * 16)
    with pytest.raises(InvalidInput, match=f"{'00' * 16}, but {'11' * 16}"):
        check_md5("11" * 16, "00" * 16)
