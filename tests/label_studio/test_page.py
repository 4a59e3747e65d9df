"""The page of a task in a real browser: the server takes interfaces that its own page cannot draw."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect

from scripts.label_studio import EMAIL, PASSWORD, LabelStudio
from scripts.screenshots import open_browser
from tests.label_studio.rows import row
from vllm_batch_dagster.adapters.label_studio import LabelStudioBoard, LabelStudioSession
from vllm_batch_dagster.core.review import make_task

WAIT_MILLISECONDS = 60_000


@pytest.fixture
def page(label_studio: LabelStudio) -> Iterator[Page]:
    with open_browser() as browser:
        page = browser.new_page(viewport={"width": 1440, "height": 1400})
        page.set_default_timeout(WAIT_MILLISECONDS)
        expect.set_options(timeout=WAIT_MILLISECONDS)
        page.goto(f"{label_studio.url}/user/login/", wait_until="domcontentloaded")
        page.fill("input[name=email]", EMAIL)
        page.fill("input[name=password]", PASSWORD)
        page.click("button[type=submit]")
        page.wait_for_url(lambda url: "/user/login" not in url, wait_until="commit")
        yield page


def test_a_person_reviews_a_task_with_several_answers(
    page: Page, session: LabelStudioSession, board: LabelStudioBoard
) -> None:
    task = make_task(row(1, answers=("<b>first</b>\n\nline", "second", "third")))
    board.add([task])
    task_id = board.find([task.key])[task.key][0].id
    page.goto(f"{board.url}/data?task={task_id}", wait_until="domcontentloaded")
    for text in ("system", "Be brief.", "question 1", "<b>first</b>", "Answer C", "third", "Which answer is best?"):
        expect(page.get_by_text(text, exact=True).first).to_be_visible()
    expect(page.get_by_text("ConfigurationError")).to_have_count(0)
    page.get_by_text("B[2]").first.click()
    page.get_by_text("accept").first.click()
    page.get_by_role("button", name="Submit").click()
    expect(page.get_by_role("button").get_by_text("Update", exact=True)).to_be_visible()
    (annotation,) = session.get(f"/api/tasks/{task_id}/annotations/")
    said = {entry["from_name"]: entry["value"] for entry in annotation["result"]}
    # The proposed text is saved without a press on Add.
    assert said == {
        "preference": {"choices": ["B"]},
        "verdict": {"choices": ["accept"]},
        "correction": {"text": ["<b>first</b>\n\nline"]},
    }


def test_a_task_with_one_answer_asks_for_no_preference(page: Page, board: LabelStudioBoard) -> None:
    task = make_task(row(2))
    board.add([task])
    page.goto(f"{board.url}/data?task={board.find([task.key])[task.key][0].id}", wait_until="domcontentloaded")
    expect(page.get_by_text("How good is answer A?").first).to_be_visible()
    expect(page.get_by_text("Which answer is best?")).to_have_count(0)
    expect(page.get_by_text("Answer B")).to_have_count(0)
