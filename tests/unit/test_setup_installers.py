"""The locks fit pyproject.toml and name no place; the machine's pip settings reach uv; where torch comes from."""

import re
import tomllib
from collections.abc import Set as AbstractSet
from pathlib import Path

import pytest
from packaging.markers import Marker, default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts import engine_environment, installers
from scripts.commands import ROOT, CommandFailed

REQUIREMENTS = ROOT / "requirements"
LOCKS = ("orchestrator", "dev", "engine-cpu", "engine-cuda")
PIN = re.compile(r"(?P<name>[a-z0-9][a-z0-9._-]*(\[[a-z,]+\])?)==(?P<version>[^\s;]+)( ; (?P<marker>.+))?")
LISTING = """\
:env:.default-timeout='180'
:env:.find-links='/one /two'
global.cert='/etc/corporate.pem'
global.extra-index-url='\\nhttps://a.example/simple\\nhttps://b.example/simple'
global.index-url='https://weak.example/simple'
install.index-url='https://strong.example/simple'
freeze.timeout='1'
nonsense
"""


def read_pins(name: str, python: str = "3.11") -> dict[str, str]:
    """Versions by name, for Linux on x86-64 and one Python."""
    environment: dict[str, str | AbstractSet[str]] = {
        **{name: str(value) for name, value in default_environment().items()},
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
    }
    pins: dict[str, str] = {}
    for line in (REQUIREMENTS / f"{name}.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        found = PIN.fullmatch(line)
        assert found, f"{name}.txt: {line!r} is no exact pin"
        if found["marker"] is None or Marker(found["marker"]).evaluate(environment):
            package = canonicalize_name(found["name"])
            assert package not in pins, f"{name}.txt pins {package} twice for Python {python}"
            pins[package] = found["version"]
    return pins


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_names_no_place(name: str) -> None:
    text = (REQUIREMENTS / f"{name}.txt").read_text()
    assert "://" not in text
    assert " @ " not in text
    assert not re.search(r"(^|\s)(--|-[a-z]\b|/)", re.sub(r"^#.*$", "", text, flags=re.MULTILINE), re.MULTILINE)


@pytest.mark.parametrize("name", LOCKS)
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_a_lock_answers_its_input(name: str, python: str) -> None:
    pins = read_pins(name, python)
    wanted = [line for line in (REQUIREMENTS / f"{name}.in").read_text().splitlines() if line[0] not in "#-"]
    assert wanted
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)], prereleases=True)


@pytest.mark.parametrize("python", ["3.11", "3.13"])
def test_the_two_locks_of_the_orchestrator_can_be_installed_together(python: str) -> None:
    runtime, tools = read_pins("orchestrator", python), read_pins("dev", python)
    shared = runtime.keys() & tools.keys()
    assert shared
    assert {name: runtime[name] for name in shared} == {name: tools[name] for name in shared}


def test_the_project_runs_on_what_is_locked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    runtime = read_pins("orchestrator")
    for requirement in map(Requirement, project["project"]["dependencies"]):
        assert requirement.specifier.contains(runtime[canonicalize_name(requirement.name)]), str(requirement)
    tools = read_pins("dev")
    for requirement in map(Requirement, project["build-system"]["requires"]):
        assert requirement.specifier.contains(tools[canonicalize_name(requirement.name)]), str(requirement)


def test_the_processor_lock_leaves_out_what_fits_no_processor_torch() -> None:
    pins = read_pins("engine-cpu")
    assert not {"torchvision", "torchaudio", "torchcodec"} & pins.keys()
    assert not [name for name in pins if name.startswith(("nvidia-", "cuda-"))]
    assert pins["torch"].endswith("+cpu")


def test_both_engine_locks_have_the_same_vllm() -> None:
    versions = {kind: engine_environment.read_pin(ROOT / lock, kind) for kind, lock in engine_environment.LOCKS.items()}
    assert len(set(versions.values())) == 1
    assert engine_environment.read_torch(ROOT / engine_environment.LOCKS["cuda"]) is None


def test_pip_settings_are_read_with_the_strongest_section_winning() -> None:
    assert installers.parse_pip_settings(LISTING) == {
        "default-timeout": "180",
        "find-links": "/one /two",
        "cert": "/etc/corporate.pem",
        "extra-index-url": "https://a.example/simple https://b.example/simple",
        "index-url": "https://strong.example/simple",
    }


def test_pip_settings_reach_uv_under_its_own_names() -> None:
    assert installers.translate_to_uv(installers.parse_pip_settings(LISTING)) == {
        "UV_HTTP_TIMEOUT": "180",
        "UV_FIND_LINKS": "/one,/two",
        "SSL_CERT_FILE": "/etc/corporate.pem",
        "UV_INDEX": "https://a.example/simple https://b.example/simple",
        "UV_DEFAULT_INDEX": "https://strong.example/simple",
    }


@pytest.mark.parametrize(("said", "expected"), [("true", {"UV_NO_INDEX": "1"}), ("false", {}), ("0", {})])
def test_no_index_is_a_switch(said: str, expected: dict[str, str]) -> None:
    assert installers.translate_to_uv({"no-index": said}) == expected


def test_what_the_user_told_uv_is_stronger_than_what_he_told_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://uv.example/simple")
    uv = installers.Uv(Path("/nowhere"), {"index-url": "https://pip.example/simple"})
    assert uv.variables["UV_DEFAULT_INDEX"] == "https://uv.example/simple"


class RecordingInstaller(installers.Pip):
    """Writes down what is asked of it; knows torch only with a further index when `needs_index`."""

    def __init__(self, needs_index: bool) -> None:
        super().__init__(Path("/nowhere"))
        self.needs_index = needs_index
        self.asked: list[tuple[str, str | None]] = []

    def install(self, environment: Path, arguments: list[str], extra_index: str | None = None) -> None:  # type: ignore[override]
        self.asked.append((Path(arguments[-1]).name, extra_index))
        if self.needs_index and extra_index is None and arguments[-1].startswith("torch"):
            raise CommandFailed(["pip"], 1, "No matching distribution found")


def install_processor_engine(needs_index: bool) -> list[tuple[str, str | None]]:
    installer = RecordingInstaller(needs_index)
    engine_environment.install_engine(installer, Path("/env"), ROOT / engine_environment.LOCKS["cpu"])
    return installer.asked


def test_torch_comes_from_the_machine_when_it_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_INDEX_URL", raising=False)
    torch = f"torch=={read_pins('engine-cpu')['torch']}"
    assert install_processor_engine(needs_index=False) == [(torch, None), ("engine-cpu.txt", None)]


def test_torch_comes_from_its_own_index_otherwise_and_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_INDEX_URL", raising=False)
    torch = f"torch=={read_pins('engine-cpu')['torch']}"
    asked = install_processor_engine(needs_index=True)
    assert asked == [(torch, None), (torch, engine_environment.TORCH_INDEX), ("engine-cpu.txt", None)]


def test_a_mirror_that_the_user_names_is_asked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_INDEX_URL", "https://mirror.example/cpu")
    asked = install_processor_engine(needs_index=True)
    assert [index for _, index in asked] == ["https://mirror.example/cpu", None]
