"""The settings of the curation: addresses, and that no secret is shown."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from vllm_batch_dagster.settings import Settings

KEY = "0123456789abcdef0123456789abcdef01234567"


def test_both_address_and_key_switch_the_push_on() -> None:
    assert not Settings(label_studio_url="http://127.0.0.1:8080", label_studio_api_key="").pushes_to_label_studio
    assert not Settings(label_studio_url="", label_studio_api_key=KEY).pushes_to_label_studio
    both = Settings(label_studio_url=" http://127.0.0.1:8080/ ", label_studio_api_key=KEY)
    assert both.pushes_to_label_studio
    assert both.label_studio_url == "http://127.0.0.1:8080"
    assert KEY not in f"{both!r}{both.model_dump()}{both.model_dump_json()}"


@pytest.mark.parametrize("url", ["localhost:8080", "ftp://host", "http://", "/path"])
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(ValidationError, match="is no http or https address"):
        Settings(label_studio_url=url)


def test_a_password_in_the_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(ValidationError, match="LABEL_STUDIO_API_KEY") as refusal:
        Settings(label_studio_url="https://me:hunter2@labels.example")
    assert "hunter2" not in str(refusal.value)


def test_the_file_of_rules_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Settings(curation_file=Path("curation.yaml")).curation_file == tmp_path / "curation.yaml"
