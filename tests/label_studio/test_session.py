"""Both kinds of keys against a real server, and that no error shows one."""

import logging
import secrets
import traceback

import pytest

from scripts.label_studio import EMAIL, LabelStudio
from tests.faults.proxy import FaultProxy
from vllm_batch_dagster.adapters.label_studio import LabelStudioSession, open_board
from vllm_batch_dagster.core.errors import ReviewFailed

WHO = "/api/current-user/whoami"


def test_a_legacy_token(session: LabelStudioSession) -> None:
    assert session.get(WHO)["email"] == EMAIL


def test_a_personal_access_token_is_exchanged_and_renewed_in_time(
    label_studio: LabelStudio, personal_token: str
) -> None:
    now = [1000.0]
    with LabelStudioSession(label_studio.url, personal_token, monotonic=lambda: now[0]) as session:
        assert session.get(WHO)["email"] == EMAIL
        first = session._access.value
        now[0] += 200
        session.get(WHO)
        assert session._access.value == first
        now[0] += 50  # it lives for 300 s
        session.get(WHO)
        assert session._access.value != first


def test_an_access_token_that_the_server_refuses_early_is_renewed(
    label_studio: LabelStudio, personal_token: str
) -> None:
    with LabelStudioSession(label_studio.url, personal_token) as session:
        session.get(WHO)
        session._access.take("expired")
        assert session.get(WHO)["email"] == EMAIL


def test_a_wrong_key_says_so_and_is_not_shown(label_studio: LabelStudio, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for key in (secrets.token_hex(20), secrets.token_urlsafe(20)):
        with LabelStudioSession(label_studio.url, key) as session, pytest.raises(ReviewFailed) as refusal:
            open_board(session, 0, "nobody's")
        assert refusal.value.status == 401
        assert not refusal.value.may_pass
        shown = "".join(traceback.format_exception(refusal.value))
        assert "401" in shown
        assert key not in shown + repr(vars(refusal.value)) + caplog.text


def test_a_revoked_personal_token_is_no_loop(label_studio: LabelStudio, personal_token: str) -> None:
    forged = personal_token[:-6] + "AAAAAA"
    with LabelStudioSession(label_studio.url, forged) as session, pytest.raises(ReviewFailed) as refusal:
        session.get(WHO)
    assert refusal.value.status == 401
    assert forged not in str(refusal.value)


def test_a_server_that_hangs_or_is_away(label_studio: LabelStudio) -> None:
    proxy = FaultProxy(label_studio.port)
    try:
        proxy.blackhole()
        with LabelStudioSession(proxy.url, label_studio.token, seconds=0.5) as session:
            with pytest.raises(ReviewFailed, match="in time") as failure:
                session.get(WHO)
            assert failure.value.may_pass
        proxy.cut()
        with LabelStudioSession(proxy.url, label_studio.token) as session:
            with pytest.raises(ReviewFailed, match="no answer") as failure:
                session.get(WHO)
            assert failure.value.may_pass
    finally:
        proxy.close()


def test_an_address_that_is_no_label_studio(label_studio: LabelStudio) -> None:
    with LabelStudioSession(label_studio.url, label_studio.token) as session:
        with pytest.raises(ReviewFailed, match="LABEL_STUDIO_URL"):
            session.get("/user/login/")
        with pytest.raises(ReviewFailed, match="redirect"):
            session.get("/")
