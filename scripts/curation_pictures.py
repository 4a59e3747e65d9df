"""The pictures of the curation: a task in Label Studio, the lineage and the report of a regression in Dagster.

Each waits for what it has to show, so a page that no longer shows it is an error and not a wrong picture.
"""

from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Browser, Page

from scripts.label_studio import EMAIL, PASSWORD
from scripts.screenshots import WAIT_MILLISECONDS, WIDTH, Picture, fit_height, hide_navigation, wait_for_content

_TASK_HEIGHT = 860
LINEAGE = Picture(
    "curation-lineage",
    "/locations/vllm_batch_dagster/asset-groups/review/lineage",
    (("reviewed_items", 1), ("training_dataset", 1), ("gold_set", 1), ("regression_report", 1), ("Passed", 1)),
    height=660,
)
REPORT = Picture(
    "regression-report",
    "/assets/regression_report?view=events",
    (("agreement_of_the_reviewed_answers", 1), ("scores_chart", 1), ("█", 1)),
)

# The report names folders of this machine.
IN_DOCS = frozenset({"label-studio-task.png", f"{LINEAGE.name}.png"})


def take_pictures(browser: Browser, dagster_url: str, label_studio_url: str, task: str, folder: Path) -> Iterator[Path]:
    """Yield the path of each picture. `task` is the path of a task's page."""
    yield _take_task(browser, f"{label_studio_url}{task}", label_studio_url, folder / "label-studio-task.png")
    for picture in (LINEAGE, REPORT):
        page = _new_page(browser, picture.height or 640)
        page.goto(f"{dagster_url}{picture.path}", wait_until="domcontentloaded")
        hide_navigation(page)
        wait_for_content(page, picture)
        if picture.height is None:
            fit_height(page, picture)
        yield _write(page, folder / f"{picture.name}.png")


def _take_task(browser: Browser, url: str, server: str, path: Path) -> Path:
    page = _new_page(browser, _TASK_HEIGHT)
    page.goto(f"{server}/user/login/", wait_until="domcontentloaded")
    page.fill("input[name=email]", EMAIL)
    page.fill("input[name=password]", PASSWORD)
    page.click("button[type=submit]")
    # The page behind it never ends loading.
    page.wait_for_url(lambda at: "/user/login" not in at, wait_until="commit")
    page.goto(url, wait_until="domcontentloaded")
    page.get_by_text("Answer A, corrected").filter(visible=True).first.wait_for()
    page.get_by_text("How good is answer A?").filter(visible=True).first.wait_for()
    return _write(page, path)


def _new_page(browser: Browser, height: int) -> Page:
    page = browser.new_page(
        viewport={"width": WIDTH, "height": height}, locale="en-GB", timezone_id="UTC", color_scheme="light"
    )
    page.set_default_timeout(WAIT_MILLISECONDS)
    return page


def _write(page: Page, path: Path) -> Path:
    page.evaluate("() => document.fonts.ready")
    page.screenshot(path=path, animations="disabled")
    page.close()
    return path
