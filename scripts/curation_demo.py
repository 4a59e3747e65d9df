"""`make curation-demo`: the whole circle once: a batch, people's review of it, training sets, and a regression.

Starts a real Label Studio and the stack in a state folder of its own, sends examples/questions.jsonl through the
engine, lets the curation push 30 tasks, annotates them through Label Studio's API as a reviewer would, pulls the
annotations, and asks the gold prompts again. Every step looks first at what is there: on the same state folder a second
run goes on where the first one ended, adds nothing, and checks that all counts are the same.

Prints where everything is. Exit code 0 only if it all holds; nothing is left running. `--docs` also renews the pictures
of docs/images.
"""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import openai
from openai.types import Batch
from playwright.sync_api import Error as BrowserError

from scripts.commands import ROOT, say
from scripts.curation_pictures import IN_DOCS, take_pictures
from scripts.dagster_runs import launch
from scripts.demo_reviewer import find_edited, find_project, list_tasks, review
from scripts.label_studio import EMAIL, PASSWORD, LabelStudio, LabelStudioFailed, running_label_studio
from scripts.screenshots import IMAGES, MOST_BYTES, open_browser
from scripts.stack import QUESTIONS, Stack, StackFailed, poll, running_stack, wait_until_idle
from vllm_batch_dagster.adapters.label_studio import LabelStudioSession
from vllm_batch_dagster.core.errors import BatchError

HOME = Path(os.environ.get("VLLM_BATCH_HOME", ROOT / ".vllm-batch-curation-demo")).absolute()
DATASETS, COUNTS = HOME / "datasets", HOME / "curation-demo.json"
NAME = "curation-demo"
TASKS = 30
BATCH_SECONDS = 900
REPORT_SECONDS = 120
RULES = f"review:\n  rules: [{{rule: random, n: {TASKS}}}]\n  cap: {TASKS}\n"
FAULTS = (StackFailed, LabelStudioFailed, BatchError, BrowserError, openai.OpenAIError, OSError)

Counts = dict[str, int | str]


def run_demo() -> None:
    HOME.mkdir(parents=True, exist_ok=True, mode=0o700)
    rules = HOME / "curation.yaml"
    rules.write_text(RULES)
    say("- starting Label Studio")
    with running_label_studio(HOME / "label-studio") as server:
        settings = {
            "LABEL_STUDIO_URL": server.url,
            "LABEL_STUDIO_API_KEY": server.token,
            "CURATION_FILE": str(rules),
            "UI_SAMPLES": "true",
            "CHUNK_SIZE": "10",
            "CHUNK_SLOTS": "8",
        }
        say("- starting the API, Dagster and the engine manager")
        with running_stack(HOME, settings) as stack, LabelStudioSession(server.url, server.token) as session:
            counts = go_round(stack, session)
            compare_with_last_time(counts)
            take_all_pictures(stack, server, session)
            say("- stopping everything")


def go_round(stack: Stack, session: LabelStudioSession) -> Counts:
    """Go once through the circle. Returns what there is at its end."""
    batch = find_or_run_batch(stack)
    # Again, although the end of the batch did it: nothing may be doubled.
    launch(stack, "curate_batch", partition=batch.id)
    project = find_project(session)
    tasks = list_tasks(session, project)
    if len(tasks) != TASKS:
        raise StackFailed(f"{len(tasks)} tasks are in Label Studio, and {TASKS} should be")
    said = review(session, tasks)
    say(f"- {len(tasks)} tasks are in Label Studio; the reviewer said: {_list(said) or 'nothing new'}")
    launch(stack, "pull_reviews")
    training, gold = read_manifest("training"), read_manifest("gold")
    say(f"- training set: {_list(training['lines'])}; gold set: {gold['items']} items")
    report = find_or_run_regression(stack, latest("gold").name.partition("=")[2])
    say(f"- regression: agreement {report['agreement']:.3f} over {report['items']} prompts")
    return {
        "batches": len(list(stack.client.batches.list(limit=100))),
        "tasks": len(list_tasks(session, project)),
        "reviewed": training["items"],
        "versions_of_annotations": count_rows(DATASETS / "reviewed"),
        **{f"{name}_lines": count for name, count in training["lines"].items()},
        "gold_items": gold["items"],
        "training_version": latest("training").name,
        "gold_version": latest("gold").name,
        "regression_prompts": report["items"],
    }


def find_or_run_batch(stack: Stack) -> Batch:
    """Return the completed batch of the questions; run it when there is none."""
    found = [each for each in stack.client.batches.list(limit=100) if (each.metadata or {}).get("name") == NAME]
    batch_id = found[0].id if found else _submit(stack)
    return follow(stack, batch_id)


def _submit(stack: Stack) -> str:
    # The keys: a run of the demo that was cut off here makes no second one.
    once = {"Idempotency-Key": NAME}
    uploaded = stack.client.files.create(file=QUESTIONS, purpose="batch", extra_headers=once)
    made = stack.client.batches.create(
        input_file_id=uploaded.id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata={"name": NAME},
        extra_headers=once,
    )
    return made.id


def follow(stack: Stack, batch_id: str) -> Batch:
    """Wait until a batch is completed and Dagster has nothing to do."""
    status = ""
    for batch in poll(stack, batch_id, BATCH_SECONDS):
        if batch.status != status:
            status = batch.status
            say(f"- {batch_id} is {status}")
    if batch.status != "completed":
        raise StackFailed(f"{batch_id} ended as {batch.status}: see {stack.log}")
    wait_until_idle(stack)
    return batch


def find_or_run_regression(stack: Stack, gold: str) -> Mapping[str, Any]:
    """Return the report of a regression over this gold set; run one when there is none."""
    if not (places := _regressions_of(gold)):
        launch(stack, "regression_batch")
        places = _regressions_of(gold)
    follow(stack, places[0].name)
    report = places[0] / "report.json"
    deadline = time.monotonic() + REPORT_SECONDS
    while not report.exists():
        stack.check_alive()
        if time.monotonic() > deadline:
            raise StackFailed(f"there is no {report} after {REPORT_SECONDS} s: see {stack.log}")
        time.sleep(1)
    wait_until_idle(stack)
    found: Mapping[str, Any] = json.loads(report.read_bytes())
    return found


def _regressions_of(gold: str) -> list[Path]:
    notes = sorted((DATASETS / "regression").glob("*/started.json"))
    return [note.parent for note in notes if json.loads(note.read_bytes())["gold"] == gold]


def latest(dataset: str) -> Path:
    return (DATASETS / dataset / "latest").resolve()


def read_manifest(dataset: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads((latest(dataset) / "manifest.json").read_bytes())
    return found


def count_rows(folder: Path) -> int:
    import polars

    return int(polars.scan_parquet(folder / "pull=*" / "*.parquet").select(polars.len()).collect().item())


def compare_with_last_time(counts: Counts) -> None:
    """Print the counts, and raise StackFailed when a demo on this state folder had others."""
    before = json.loads(COUNTS.read_text()) if COUNTS.exists() else None
    for name, count in counts.items():
        say(f"  {name.replace('_', ' '):<26} {count}")
    if before is not None and before != counts:
        changed = {name: (before.get(name), count) for name, count in counts.items() if before.get(name) != count}
        raise StackFailed(f"the demo before had other counts (before, now): {changed}. Delete {HOME} to begin anew")
    if before is not None:
        say("- all counts are those of the run before: nothing was doubled")
    COUNTS.write_text(json.dumps(counts, indent=2))


def take_all_pictures(stack: Stack, server: LabelStudio, session: LabelStudioSession) -> None:
    folder = HOME / "images"
    folder.mkdir(exist_ok=True)
    project = find_project(session)
    task = find_edited(session, list_tasks(session, project))
    with open_browser() as browser:
        for path in take_pictures(
            browser, stack.dagster_url, server.url, f"/projects/{project}/data?task={task}", folder
        ):
            _keep(path)


def _keep(path: Path) -> None:
    size = path.stat().st_size
    say(f"- picture: {path}, {size / 1000:.0f} kB")
    if "--docs" in sys.argv and path.name in IN_DOCS:
        if size > MOST_BYTES:
            raise StackFailed(f"{path} is larger than {MOST_BYTES / 1000:.0f} kB: show less on it")
        shutil.copy(path, IMAGES / path.name)


def tell_where() -> None:
    """Print where what is. Paths stand alone on a line, so that they can be copied."""
    places = {
        "Chats for SFT, preference pairs for DPO, labelled completions for KTO, all judged answers": latest("training"),
        "The gold set": latest("gold"),
        "The scores of the regression": DATASETS / "regression",
        "Every version of every annotation": DATASETS / "reviewed",
        "Pictures of the task page, the lineage and the report": HOME / "images",
    }
    for label, place in places.items():
        print(f"{label}:\n  {place}")
    print(f"Label Studio's own state (user {EMAIL}, password {PASSWORD}):\n  {HOME / 'label-studio'}")
    print("Corrections as examples for a prompt, or as the next batch:")
    print(f"  VLLM_BATCH_HOME={HOME} .venv/bin/vllm-batch reviews export --as few-shot")
    print(f"  VLLM_BATCH_HOME={HOME} .venv/bin/vllm-batch reviews export --as next-batch --examples 3")


def _list(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def main() -> int:
    # A closed terminal or a `kill` stops everything as Ctrl-C does.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        run_demo()
    except FAULTS as error:
        say(f"The demo failed: {error}")
        return 1
    except KeyboardInterrupt:
        say("The demo was interrupted. Everything is stopped.")
        return 130
    with suppress(BrokenPipeError):
        tell_where()
    return 0


if __name__ == "__main__":
    sys.exit(main())
