"""Followers of GET /v1/batches/{id}/results: lines as they come, the end, markers, reruns, deaths, people who leave."""

import asyncio
import http.client
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import pytest
from fastapi import FastAPI

import api_shim.results
from tests.api.conftest import PATIENCE_SECONDS, wait_for
from tests.api.test_results import finish, give
from tests.unit.conftest import Rig, WatchedEngine, request_lines, until
from vllm_batch_dagster.core.states import BatchEvent

MANY = 20


@pytest.fixture(autouse=True)
def _look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_shim.results, "LOOK_SECONDS", 0.02)


class Follower:
    """A client that reads a stream line by line on a connection of its own."""

    def __init__(self, base_url: str, batch_id: str, query: str = "") -> None:
        self._connection = http.client.HTTPConnection(urlsplit(base_url).netloc, timeout=PATIENCE_SECONDS)
        self._connection.request("GET", f"/v1/batches/{batch_id}/results?follow=1{query}")
        self._response = self._connection.getresponse()
        self.status = self._response.status

    def line(self) -> Any:
        """The next line; None at the end."""
        line = self._response.readline()
        return json.loads(line) if line else None

    def rest(self) -> Iterator[Any]:
        return iter(self.line, None)

    def leave(self) -> None:
        self._response.close()
        self._connection.close()


def test_a_follower_gets_lines_as_they_come_and_the_end(base_url: str, rig: Rig) -> None:
    batch_id = rig.start(5)
    attempt = rig.begin(batch_id)
    give(attempt, 1)
    follower = Follower(base_url, batch_id)
    assert follower.line()["custom_id"] == "id-1"
    give(attempt, 0)
    assert follower.line()["custom_id"] == "id-0"
    give(attempt, 2, 3, 4)
    finish(rig, batch_id, attempt)
    assert [row["custom_id"] for row in follower.rest()] == ["id-2", "id-3", "id-4"]


def test_a_follower_begins_before_validation(base_url: str, rig: Rig) -> None:
    batch_id = rig.create(rig.upload(request_lines(1)))
    follower = Follower(base_url, batch_id)
    rig.validate(batch_id)
    attempt = rig.begin(batch_id)
    give(attempt, 0)
    assert follower.line()["custom_id"] == "id-0"
    finish(rig, batch_id, attempt)
    assert follower.line() is None


def test_a_follower_that_is_cut_off_resumes_behind_its_last_marker(base_url: str, rig: Rig) -> None:
    batch_id = rig.start(5)
    attempt = rig.begin(batch_id)
    give(attempt, 1, 2)
    follower = Follower(base_url, batch_id, "&cursors=1")
    rows = [follower.line() for _ in range(3)]
    marker = rows[-1]
    assert [row.get("custom_id") for row in rows] == ["id-1", "id-2", None]
    assert marker["object"] == "cursor"
    follower.leave()
    give(attempt, 0)
    again = Follower(base_url, batch_id, f"&after={marker['after']}")
    assert again.line()["custom_id"] == "id-0"
    give(attempt, 3, 4)
    finish(rig, batch_id, attempt)
    assert [row["custom_id"] for row in again.rest()] == ["id-3", "id-4"]


def test_a_follower_that_asked_for_markers_hears_one_in_the_silence(
    base_url: str, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_shim.results, "MARKER_SECONDS", 0.05)
    follower = Follower(base_url, rig.start(1), "&cursors=1")
    assert follower.line() == {"object": "cursor", "after": "v1"}
    follower.leave()


def test_a_rerun_while_following_doubles_no_line(base_url: str, rig: Rig) -> None:
    batch_id = rig.start(5)
    attempt = rig.begin(batch_id)
    follower = Follower(base_url, batch_id)
    give(attempt, 0, 1)
    assert [follower.line()["custom_id"] for _ in range(2)] == ["id-0", "id-1"]
    again = rig.begin(batch_id, fresh=True)
    give(again, 0, 1, 2, 3, 4)
    assert [follower.line()["custom_id"] for _ in range(3)] == ["id-2", "id-3", "id-4"]
    finish(rig, batch_id, again)
    assert follower.line() is None


async def test_followers_of_a_killed_and_resumed_inference_get_every_line_once(base_url: str, rig: Rig) -> None:
    batch_id = rig.start(request_lines(200), chunk_size=20)
    followers = [Follower(base_url, batch_id, query) for query in ("", "", "&cursors=1")]
    with ThreadPoolExecutor(len(followers)) as threads:
        reading = [threads.submit(lambda follower: list(follower.rest()), follower) for follower in followers]
        engine = WatchedEngine(holds=lambda line: line % 7 == 3, latency=0.002)
        killed = asyncio.create_task(rig.infer(batch_id, engine))
        await until(lambda: len(engine.asked) > 60)
        killed.cancel()
        await asyncio.gather(killed, return_exceptions=True)
        await rig.infer(batch_id, WatchedEngine())
        await rig.infer(batch_id, WatchedEngine(), only=[2], fresh=[2])
        await asyncio.to_thread(rig.merge, batch_id)
        streams = await asyncio.gather(*(asyncio.wrap_future(future) for future in reading))

    expected = sorted(f"id-{number}" for number in range(200))
    for rows in streams:
        assert sorted(row["custom_id"] for row in rows if "custom_id" in row) == expected
    assert streams[2][-1] == {"object": "cursor", "after": "v1_0-9"}


def test_who_goes_away_is_forgotten_and_there_is_a_most(app: FastAPI, base_url: str, rig: Rig) -> None:
    seats = app.state.services.followers
    seats.most = 2
    batch_id = rig.start(5)
    first, second = (Follower(base_url, batch_id) for _ in range(2))
    wait_for(lambda: seats.taken == 2)
    refused = Follower(base_url, batch_id)
    assert refused.status == 429
    assert refused.line()["error"]["code"] == "too_many_followers"
    first.leave()
    wait_for(lambda: seats.taken == 1)
    third = Follower(base_url, batch_id)
    assert third.status == 200
    second.leave()
    wait_for(lambda: seats.taken == 1)
    rig.store.batches.advance(batch_id, BatchEvent.CANCEL, int(rig.clock()))
    rig.merge(batch_id)
    assert third.line() is None
    wait_for(lambda: seats.taken == 0)


def test_who_waits_for_lines_holds_no_thread(
    app: FastAPI, base_url: str, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few threads are kept that looked for lines: they are not counted one by one."""
    monkeypatch.setattr(api_shim.results, "LOOK_SECONDS", 3600)
    seats = app.state.services.followers
    batch_id, before = rig.start(5), threading.active_count()
    followers = [Follower(base_url, batch_id) for _ in range(MANY)]
    wait_for(lambda: seats.taken == MANY)
    assert threading.active_count() < before + MANY / 2
    for follower in followers:
        follower.leave()
    wait_for(lambda: seats.taken == 0)
