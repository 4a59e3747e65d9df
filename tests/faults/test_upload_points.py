"""The API dies exactly between the steps of a completed upload, and does it again."""

import hashlib

import httpx2
import pytest

from tests.faults.conftest import ApiProcess

pytestmark = pytest.mark.timeout(300)

PART = b"a part of the file\n" * 1000


@pytest.mark.parametrize(("point", "is_in_place"), [("joining", False), ("joined", True)])
def test_a_completion_that_dies_there_is_done_again(api: ApiProcess, point: str, is_in_place: bool) -> None:
    content = PART * 2
    with api.client() as client:
        params = {"filename": "f", "purpose": "user_data", "bytes": len(content), "mime_type": "text/plain"}
        upload_id = client.post("/uploads", json=params).raise_for_status().json()["id"]
        parts = [client.post(f"/uploads/{upload_id}/parts", files={"data": PART}).json()["id"] for _ in range(2)]
        wanted = {"part_ids": parts, "md5": hashlib.md5(content).hexdigest()}
        (api.points / f"{point}.{upload_id}").write_text("kill")
        with pytest.raises(httpx2.TransportError):
            client.post(f"/uploads/{upload_id}/complete", json=wanted)
        assert bool(api.visible()) is is_in_place, "the contents may be there, no record names them"

        api.restart()
        assert client.get("/files").json()["data"] == []
        file = client.post(f"/uploads/{upload_id}/complete", json=wanted).raise_for_status().json()["file"]
        assert client.get(f"/files/{file['id']}/content").content == content
        assert [listed["id"] for listed in client.get("/files").json()["data"]] == [file["id"]]
    assert api.visible() == [file["id"]], "what the dead one had left is gone"
