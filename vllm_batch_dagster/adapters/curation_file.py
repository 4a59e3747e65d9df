"""Reads `curation.yaml` (CURATION_FILE). What it may say is in core/curation_rules.py."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import yaml

from vllm_batch_dagster.core.curation_rules import CurationRules, parse_rules
from vllm_batch_dagster.core.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class LoadedRules:
    """`path` None: the defaults. `digest` of what the rules mean, however the file is laid out."""

    rules: CurationRules
    path: Path | None
    digest: str


def load_rules(path: Path | None) -> LoadedRules:
    """Read the rules of this moment. Raises ConfigurationError, which names the place in the file."""
    try:
        rules = parse_rules(_read(path) if path is not None else None)
    except ConfigurationError as error:
        raise ConfigurationError(f"CURATION_FILE {path}: {error}") from None
    digest = hashlib.sha256(rules.model_dump_json().encode()).hexdigest()
    return LoadedRules(rules, path, digest[:16])


def _read(path: Path) -> object:
    try:
        content: object = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigurationError(f"is no YAML: {' '.join(str(error).split())}") from None
    return content
