"""The environment of Label Studio: what its lock says, and what is said where it is missing."""

from pathlib import Path

import pytest

from scripts import label_studio, label_studio_environment
from scripts.commands import ROOT, SetupError


def test_the_lock_pins_it_and_nothing_of_it_is_in_our_own_environment() -> None:
    assert label_studio_environment.read_pin(ROOT / label_studio_environment.LOCK)
    ours = (ROOT / "requirements" / "orchestrator.txt").read_text()
    assert "label-studio" not in ours
    assert "opencv" not in ours


def test_a_lock_without_it(tmp_path: Path) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text("django==5\n")
    with pytest.raises(SetupError, match="does not pin label-studio"):
        label_studio_environment.read_pin(lock)


@pytest.mark.parametrize("is_cut", [False, True])
def test_a_missing_or_cut_environment_is_named_with_the_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_cut: bool
) -> None:
    monkeypatch.setattr(label_studio, "ENVIRONMENT", str(tmp_path / "env"))
    if is_cut:
        python = tmp_path / "env" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.touch()
        (tmp_path / "env" / "pyvenv.cfg").write_text("version = 3.11.7\n")
    with pytest.raises(label_studio.LabelStudioFailed, match="make setup-label-studio"):
        label_studio.find_program()


def test_it_calls_nobody() -> None:
    variables = label_studio_environment.state_variables(Path("state"))
    assert variables["LABEL_STUDIO_SENTRY_DSN"] == variables["LABEL_STUDIO_FRONTEND_SENTRY_DSN"] == ""
    assert variables["LABEL_STUDIO_COLLECT_ANALYTICS"] == "false"
    assert {value for value in variables.values() if "state" in value} == {"state", "state/xdg"}
