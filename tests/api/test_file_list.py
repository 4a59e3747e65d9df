"""Listing files over HTTP: items 10 to 12 of the contract's checklist, and paging over expired ones."""

from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from vllm_batch_dagster.adapters.memory import FixedClock

Upload = Callable[..., dict[str, Any]]


def test_10_newest_first_asc_reverses_and_purpose_filters(
    client: TestClient, upload: Upload, clock: FixedClock
) -> None:
    first, second = upload(), upload(purpose="user_data")  # within one second
    clock.advance(1)
    third = upload()

    assert ids(client, "") == [third["id"], second["id"], first["id"]]
    assert ids(client, "?order=asc") == [first["id"], second["id"], third["id"]]
    assert ids(client, "?purpose=user_data") == [second["id"]]
    assert ids(client, "?purpose=batch_output") == []


@pytest.mark.parametrize("limit", [1, 10_000])
def test_11_list_has_all_keys(client: TestClient, upload: Upload, limit: int) -> None:
    file = upload()
    page = client.get(f"/v1/files?limit={limit}").json()

    assert page.keys() == {"object", "data", "first_id", "last_id", "has_more"}
    assert (page["object"], page["first_id"], page["last_id"]) == ("list", file["id"], file["id"])
    assert page["data"] == [file]


def test_11_an_empty_page_has_null_ids(client: TestClient) -> None:
    page = client.get("/v1/files").json()
    assert page == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}


@pytest.mark.parametrize(
    ("query", "param", "code"),
    [
        ("limit=0", "limit", "integer_below_min_value"),
        ("limit=10001", "limit", "integer_above_max_value"),
        ("limit=many", "limit", "invalid_type"),
        ("order=up", "order", "invalid_value"),
        ("purpose=nonsense", "purpose", "invalid_value"),
        ("after=file-unknown", "after", "invalid_value"),
        ("after=%00", "after", "invalid_value"),
    ],
)
def test_11_wrong_queries_are_refused(client: TestClient, query: str, param: str, code: str) -> None:
    answer = client.get(f"/v1/files?{query}")

    assert answer.status_code == 400
    assert (answer.json()["error"]["param"], answer.json()["error"]["code"]) == (param, code)


def test_12_paging_visits_each_file_once(client: TestClient, upload: Upload) -> None:
    expected = [upload()["id"] for _ in range(5)]
    assert walk(client, "order=asc&limit=1") == expected
    assert walk(client, "order=asc&limit=2") == expected
    assert walk(client, "limit=3") == expected[::-1]


def test_18_pages_stay_full_when_expired_files_lie_between(
    client: TestClient, upload: Upload, clock: FixedClock
) -> None:
    brief = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    lasting = [upload(**fields)["id"] for fields in ({}, brief, brief, brief, {}, brief, {})][::-1]
    clock.advance(3600)

    expected = [lasting[0], lasting[2], lasting[6]]
    assert walk(client, "limit=1") == expected
    assert walk(client, "limit=2") == expected


def ids(client: TestClient, query: str) -> list[str]:
    return [file["id"] for file in client.get(f"/v1/files{query}").json()["data"]]


def walk(client: TestClient, query: str) -> list[str]:
    """Follow `after` as the openai client does: until has_more is false. Fails on an empty page before that."""
    found: list[str] = []
    while True:
        cursor = f"&after={found[-1]}" if found else ""
        page = client.get(f"/v1/files?{query}{cursor}").json()
        found += [file["id"] for file in page["data"]]
        if not page["has_more"]:
            return found
        assert page["data"], "a client stops at an empty page"
