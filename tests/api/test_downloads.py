"""Contents over HTTP: ranges, what makes a resumed download safe, HEAD, content encodings."""

import gzip
import hashlib
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from backports import zstd
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from openai import OpenAI
from starlette.testclient import TestClient

from api_shim.byteranges import ByteRange, Unsatisfiable, read_range
from api_shim.downloads import BLOCK_BYTES
from api_shim.encodings import MIN_ENCODED_BYTES, choose_encoding
from tests.api.conftest import PATIENCE_SECONDS

Upload = Callable[..., dict[str, Any]]
CONTENT = b"".join(b'{"custom_id": "%06d"}\n' % number for number in range(80_000))
SIZE = len(CONTENT)
ETAG = f'"{hashlib.sha256(CONTENT).hexdigest()}"'


@pytest.fixture
def url(upload: Upload) -> str:
    assert SIZE > BLOCK_BYTES + 1000  # more than one block, and a range across its end
    return f"/v1/files/{upload(CONTENT)['id']}/content"


def get(client: TestClient, url: str, method: str = "GET", **headers: str) -> httpx2.Response:
    """Plain unless the call says otherwise: the client lists every encoding that it knows by itself."""
    sent = {"accept-encoding": "identity"} | {name.replace("_", "-"): text for name, text in headers.items()}
    return client.request(method, url, headers=sent)


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=10-1048590", 10, 1_048_591),
        ("bytes=1000000-", 1_000_000, SIZE),
        ("bytes=-7", SIZE - 7, SIZE),
        ("bytes=5-999999999999", 5, SIZE),
        (f"bytes=-{SIZE + 1}", 0, SIZE),
        ("Bytes = 3 - 4", 3, 5),
    ],
)
def test_a_range_is_a_part_of_the_file(client: TestClient, url: str, asked: str, start: int, end: int) -> None:
    answer = get(client, url, range=asked)

    assert answer.status_code == 206
    assert answer.content == CONTENT[start:end]
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{SIZE}"
    assert answer.headers["content-length"] == str(end - start)
    assert answer.headers["etag"] == ETAG


@pytest.mark.parametrize(
    "asked", ["bytes=0-1,5-6", "lines=0-1", "bytes=5-4", "bytes=-", "bytes=a-b", "bytes=0-" + "9" * 20, "nonsense", ""]
)
def test_what_is_no_single_range_gets_the_whole_file(client: TestClient, url: str, asked: str) -> None:
    answer = get(client, url, range=asked)

    assert (answer.status_code, answer.content) == (200, CONTENT)
    assert answer.headers["accept-ranges"] == "bytes"
    assert "content-range" not in answer.headers


@pytest.mark.parametrize("asked", [f"bytes={SIZE}-", "bytes=-0", f"bytes={SIZE}-{SIZE + 5}"])
def test_a_range_beyond_the_file_is_416(client: TestClient, url: str, asked: str) -> None:
    answer = get(client, url, range=asked)

    assert answer.status_code == 416
    assert answer.headers["content-range"] == f"bytes */{SIZE}"
    assert answer.json()["error"]["code"] == "range_not_satisfiable"
    assert str(SIZE) in answer.json()["error"]["message"]


def test_an_empty_file_has_no_range(client: TestClient, upload: Upload) -> None:
    url = f"/v1/files/{upload(b'')['id']}/content"

    assert (get(client, url).status_code, get(client, url).content) == (200, b"")
    assert get(client, url, range="bytes=0-").status_code == 416


@given(size=st.integers(0, 30), first=st.none() | st.integers(0, 40), last=st.none() | st.integers(0, 40))
def test_ranges_are_those_of_rfc_9110(size: int, first: int | None, last: int | None) -> None:
    asked = f"bytes={'' if first is None else first}-{'' if last is None else last}"
    whole = list(range(size))
    if first is None:
        wanted = None if last is None else whole[-last:] if last else []
    elif last is not None and last < first:
        wanted = None
    else:
        wanted = whole[first:] if last is None else whole[first : last + 1]

    try:
        found = read_range(asked, size)
    except Unsatisfiable:
        assert wanted == []
        return
    assert found == (ByteRange(wanted[0], wanted[-1] + 1) if wanted is not None else None)


def test_a_broken_download_is_resumed_piece_by_piece(client: TestClient, url: str) -> None:
    first = get(client, url, range="bytes=0-999999")
    rest = get(client, url, range="bytes=1000000-", if_range=first.headers["etag"])

    assert (first.status_code, rest.status_code) == (206, 206)
    assert first.content + rest.content == CONTENT


@pytest.mark.parametrize("tag", ['"of other contents"', f"W/{ETAG}", "Wed, 21 Oct 2015 07:28:00 GMT"])
def test_a_part_of_other_contents_is_not_sent(client: TestClient, url: str, tag: str) -> None:
    answer = get(client, url, range="bytes=5-", if_range=tag)
    assert (answer.status_code, answer.content) == (200, CONTENT)


@pytest.mark.parametrize(
    ("tag", "status"), [(ETAG, 304), (f'"x", W/{ETAG}', 304), ("*", 304), ('"x"', 200), (ETAG.strip('"'), 200)]
)
def test_contents_that_are_known_are_not_sent_again(client: TestClient, url: str, tag: str, status: int) -> None:
    answer = get(client, url, if_none_match=tag)

    assert answer.status_code == status
    assert answer.headers["etag"] == ETAG
    assert answer.content == (CONTENT if status == 200 else b"")


def test_head_describes_and_sends_nothing(base_url: str, sdk: OpenAI) -> None:
    file = sdk.files.create(file=("in.jsonl", CONTENT), purpose="batch")
    with httpx2.Client(base_url=base_url, timeout=PATIENCE_SECONDS) as client:
        for _ in range(2):  # the connection must still be usable
            answer = client.head(
                f"/v1/files/{file.id}/content", headers={"accept-encoding": "identity", "range": "bytes=0-1"}
            )
            assert (answer.status_code, answer.content) == (200, b"")
            assert answer.headers["content-length"] == str(SIZE)
            assert answer.headers["etag"] == ETAG
        encoded = client.head(f"/v1/files/{file.id}/content", headers={"accept-encoding": "zstd"})
        assert encoded.headers["content-encoding"] == "zstd"
        assert "content-length" not in encoded.headers
        assert client.head("/v1/files/file-0/content").status_code == 404


@pytest.mark.parametrize(
    ("coding", "decode"),
    [("gzip", gzip.decompress), ("zstd", zstd.decompress)],
)
def test_contents_are_encoded_on_demand(
    base_url: str, sdk: OpenAI, coding: str, decode: Callable[[bytes], bytes]
) -> None:
    file = sdk.files.create(file=("in.jsonl", CONTENT), purpose="batch")
    url, headers = f"{base_url}/v1/files/{file.id}/content", {"accept-encoding": coding}
    with httpx2.stream("GET", url, headers=headers, timeout=PATIENCE_SECONDS) as answer:
        sent = b"".join(answer.iter_raw())

    assert answer.headers["content-encoding"] == coding
    assert answer.headers["vary"] == "Accept-Encoding"
    assert answer.headers["etag"] == f'{ETAG[:-1]}-{coding}"'
    assert "content-length" not in answer.headers
    assert len(sent) < SIZE / 3
    assert decode(sent) == CONTENT


def test_random_bytes_survive_encoding(client: TestClient, upload: Upload) -> None:
    content = hashlib.shake_256(b"seed").digest(BLOCK_BYTES + 12_345)
    url = f"/v1/files/{upload(content, purpose='user_data')['id']}/content"
    for coding in ("gzip", "zstd"):
        assert get(client, url, accept_encoding=coding).content == content


def test_a_part_is_never_encoded(client: TestClient, url: str) -> None:
    answer = get(client, url, range="bytes=0-99999", accept_encoding="zstd")
    assert (answer.status_code, answer.content) == (206, CONTENT[:100_000])
    assert "content-encoding" not in answer.headers


def test_a_tag_of_encoded_contents_resumes_nothing(client: TestClient, url: str) -> None:
    encoded = get(client, url, accept_encoding="zstd")
    answer = get(client, url, range="bytes=5-", if_range=encoded.headers["etag"])
    assert (answer.status_code, answer.content) == (200, CONTENT)
    assert get(client, url, accept_encoding="zstd", if_none_match=encoded.headers["etag"]).status_code == 304


@pytest.mark.parametrize(
    ("accepted", "chosen"),
    [
        (None, None),
        ("", None),
        ("identity", None),
        ("*", None),
        ("br", None),
        ("zstd", "zstd"),
        ("ZSTD", "zstd"),
        ("gzip, deflate, br, zstd", "zstd"),
        ("zstd;q=0, gzip", "gzip"),
        ("zstd;q=0.2, identity;q=0.5", None),
        ("zstd;q=nonsense", None),
        ("gzip", "gzip"),
        ("gzip;q=0.5", "gzip"),
        ("gzip;q=1.0, identity;q=0.5, *;q=0", "gzip"),
        ("gzip;q=0.5, identity", None),
        ("gzip, deflate", None),
        ("gzip, deflate, identity;q=0", "gzip"),
        ("gzip, deflate, *;q=0", "gzip"),
        ("gzip;q=0, *", None),
        (", ,", None),
    ],
)
def test_the_encoding_follows_what_the_client_lists(accepted: str | None, chosen: str | None) -> None:
    assert choose_encoding(accepted, MIN_ENCODED_BYTES) == chosen
    assert choose_encoding(accepted, MIN_ENCODED_BYTES - 1) is None


def test_the_official_client_gets_the_same_bytes_however_they_travel(sdk: OpenAI) -> None:
    file = sdk.files.create(file=("in.jsonl", CONTENT), purpose="batch")

    for accepted in ("gzip, deflate", "gzip", "zstd", "identity"):
        content = sdk.files.content(file.id, extra_headers={"Accept-Encoding": accepted})
        assert content.content == CONTENT
    with sdk.files.with_streaming_response.content(file.id) as answer:
        assert b"".join(answer.iter_bytes()) == CONTENT


def test_a_file_that_lost_its_contents_is_404_before_anything_is_sent(
    client: TestClient, app: FastAPI, url: str
) -> None:
    app.state.services.files.delete(url.split("/")[3])
    for method in ("GET", "HEAD"):
        assert get(client, url, method).status_code == 404


def test_results_take_ranges_too(client: TestClient, app: FastAPI, upload: Upload, lead_to: Callable[..., str]) -> None:
    batch_id = lead_to("completed")
    app.state.services.store.batches.amend(batch_id, output_file_id=upload(CONTENT)["id"])
    answer = get(client, f"/v1/batches/{batch_id}/results", range="bytes=-100")
    assert (answer.status_code, answer.content) == (206, CONTENT[-100:])
