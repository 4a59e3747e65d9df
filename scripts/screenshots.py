"""`make screenshots`: the pictures of docs/images, taken from a real batch with a real browser.

Starts the stack on a temporary state folder, sends examples/questions.jsonl in four chunks through the real engine,
opens the pages of the Dagster UI in a Chromium without a window, and stops everything. It waits for what a picture
has to show, so a page that no longer shows it is an error and not a wrong picture.
"""

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import openai
from playwright.sync_api import Browser, Page, Playwright, sync_playwright
from playwright.sync_api import Error as BrowserError

from scripts.commands import ROOT, say
from scripts.stack import Stack, StackFailed, poll, running_stack, submit, wait_until_idle

IMAGES = ROOT / "docs" / "images"
SETTINGS = {"UI_SAMPLES": "true", "CHUNK_SIZE": "10", "CHUNK_SLOTS": "8"}
BATCH_SECONDS = 600
WAIT_MILLISECONDS = 60_000
MOST_BYTES = 300_000
WIDTH, HEIGHT, MOST_HEIGHT = 1440, 640, 2400
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

# How much higher the window must be so that nothing on the page has to be scrolled.
_HIDDEN_HEIGHT = """() => Math.max(0, ...[...document.querySelectorAll('*')]
    .filter(e => ['auto', 'scroll'].includes(getComputedStyle(e).overflowY))
    .map(e => e.scrollHeight - e.clientHeight))"""


@dataclass(frozen=True, slots=True)
class Picture:
    """One page of the UI. `shows` are texts that must be on it, with how often at least.

    The picture is made as high as the page needs, unless `height` says how high.
    """

    name: str
    path: str
    shows: tuple[tuple[str, int], ...]
    height: int | None = None


def pictures_of(batch_id: str) -> tuple[Picture, ...]:
    """Return the pictures of a finished batch of four chunks."""
    chunk = quote(f"{batch_id}|0000")
    return (
        Picture(
            "asset-graph",
            "/locations/vllm_batch_dagster/asset-groups/batch/lineage",
            (("100% filled", 5), ("Passed", 3), ("8 partitions", 1)),
            height=560,
        ),
        Picture(
            "validated-input",
            f"/assets/validated_input?view=partitions&partition={batch_id}",
            ((batch_id, 2), ("request_lengths", 1), ("█", 1)),
        ),
        Picture(
            "chunk",
            f"/assets/chunk_results?view=partitions&partition={chunk}",
            ((f"{batch_id}|0000", 1), ("tokens_per_s", 1), ("█", 2), ("capital-japan", 1)),
        ),
        Picture(
            "merged-output",
            f"/assets/merged_output?view=partitions&partition={batch_id}",
            ((batch_id, 2), ("output_file", 1), ("0003", 2), ("█", 1)),
        ),
        Picture(
            "asset-checks",
            "/assets/merged_output?view=checks&checkDetail=custom_ids_once",
            (("counts_conserved", 1), ("custom_ids_once", 2), ("Passed", 1)),
        ),
    )


def find_browser(playwright: Playwright) -> str:
    """Return the program of an installed Chromium, or of Playwright's own. Raises StackFailed when there is none."""
    for name in BROWSERS:
        if found := shutil.which(name):
            return found
    own = playwright.chromium.executable_path
    if Path(own).exists():
        return own
    raise StackFailed(
        f"no browser: none of {', '.join(BROWSERS)} is installed. Install one (Debian: `apt-get install chromium`) "
        "or run `.venv/bin/playwright install chromium`"
    )


@contextmanager
def open_browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(playwright), args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


def take(browser: Browser, url: str, picture: Picture) -> Path:
    """Open the page, wait for its content, and write the picture at the height that shows all of it."""
    page = browser.new_page(
        viewport={"width": WIDTH, "height": picture.height or HEIGHT},
        locale="en-GB",
        timezone_id="UTC",
        color_scheme="light",
    )
    page.set_default_timeout(WAIT_MILLISECONDS)
    page.goto(f"{url}{picture.path}", wait_until="domcontentloaded")
    hide_navigation(page)
    wait_for_content(page, picture)
    if picture.height is None:
        fit_height(page, picture)
    path = IMAGES / f"{picture.name}.png"
    page.screenshot(path=path, animations="disabled")
    page.close()
    return path


def hide_navigation(page: Page) -> None:
    """Fold the UI's navigation: the pictures are about the pane beside it."""
    page.get_by_text("Hide navigation").click()
    page.get_by_text("Hide navigation").wait_for(state="detached")


def wait_for_content(page: Page, picture: Picture) -> None:
    for text, times in picture.shows:
        # The UI measures its texts in hidden copies of them.
        page.get_by_text(text).filter(visible=True).nth(times - 1).wait_for()
    page.evaluate("() => document.fonts.ready")


def fit_height(page: Page, picture: Picture) -> None:
    height = HEIGHT
    while (hidden := page.evaluate(_HIDDEN_HEIGHT)) and height < MOST_HEIGHT:
        height = min(height + hidden, MOST_HEIGHT)
        page.set_viewport_size({"width": WIDTH, "height": height})
        wait_for_content(page, picture)


def run_batch(stack: Stack) -> str:
    """Send the questions through the stack and wait until Dagster has nothing to do. Returns the batch's id."""
    batch_id = submit(stack.client)
    status = ""
    for batch in poll(stack, batch_id, BATCH_SECONDS):
        if batch.status != status:
            status = batch.status
            say(f"- {batch_id} is {status}")
    if status != "completed":
        raise StackFailed(f"{batch_id} ended as {status}: see {stack.log}")
    wait_until_idle(stack)
    return batch_id


def take_pictures() -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    with open_browser() as browser, tempfile.TemporaryDirectory(prefix="screenshots-") as home:
        say("- starting the stack")
        with running_stack(Path(home), SETTINGS) as stack:
            for picture in pictures_of(run_batch(stack)):
                path = take(browser, stack.dagster_url, picture)
                size = path.stat().st_size
                say(f"- {os.path.relpath(path, ROOT)}: {size / 1000:.0f} kB")
                if size > MOST_BYTES:
                    raise StackFailed(f"{path} is larger than {MOST_BYTES / 1000:.0f} kB: show less on it")
            say("- stopping the stack")


def main() -> int:
    # A closed terminal or a `kill` stops the stack as Ctrl-C does.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        take_pictures()
    except (StackFailed, BrowserError, openai.OpenAIError, OSError) as error:
        say(f"No new pictures: {error}")
        return 1
    except KeyboardInterrupt:
        say("Interrupted. Everything is stopped.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
