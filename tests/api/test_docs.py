"""docs/api.md against the code: every route has its heading, and every example runs as it stands."""

import re
import subprocess
from pathlib import Path

from fastapi import FastAPI
from starlette.testclient import TestClient

PAGE = Path(__file__).parents[2] / "docs" / "api.md"


def test_every_route_has_a_heading_and_every_heading_a_route(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    routes = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}

    assert set(re.findall(r"^### `(.+)`$", PAGE.read_text(), re.MULTILINE)) == routes


def test_the_examples_run_in_order(app: FastAPI, base_url: str, tmp_path: Path) -> None:
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    script = "set -euo pipefail\nset -x\n" + "\n".join(blocks).replace("http://localhost:4080", base_url)

    run = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert len(blocks) > 10
    assert run.returncode == 0, run.stderr
    assert '"error"' not in run.stdout
    assert '"status":"cancelling"' in run.stdout
    assert (tmp_path / "results.jsonl").read_text() == ""  # nothing runs here
    assert '"batch.validation"' in run.stdout
