"""What `vllm-batch doctor` says of the curation. A Label Studio that answers: tests/label_studio."""

import socket
from pathlib import Path

import pytest

from vllm_batch_dagster.cli.curation_checkup import NEEDS_BOTH, check_curation
from vllm_batch_dagster.settings import Settings

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("CURATION_FILE", "LABEL_STUDIO_URL", "LABEL_STUDIO_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def test_the_defaults_are_fine() -> None:
    (rules,) = check_curation(Settings())
    assert (rules.check, rules.level) == ("curation rules", "ok")
    assert rules.text.startswith("defaults (")


def test_a_mistake_in_the_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "curation.yaml"
    path.write_text("review: {cap: many}")
    (rules,) = check_curation(Settings(curation_file=path))
    assert rules.level == "warn"
    assert "review.cap: " in rules.text


def test_half_of_the_settings(tmp_path: Path) -> None:
    found = list(check_curation(Settings(label_studio_api_key=KEY)))
    assert (found[1].level, found[1].mend) == ("warn", NEEDS_BOTH)


def test_a_label_studio_that_is_away_is_a_warning_without_the_key() -> None:
    with socket.socket() as plug:
        plug.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{plug.getsockname()[1]}"
        found = list(check_curation(Settings(label_studio_url=url, label_studio_api_key=KEY)))
    assert found[1].level == "warn"
    assert "no answer from Label Studio" in found[1].text
    assert KEY not in str(found)
