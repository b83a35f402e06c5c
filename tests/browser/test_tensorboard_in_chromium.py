"""What Chromium draws of real trainings: the curve of one that was killed and resumed twice, and a sweep in HParams.

RUNMGR_THOROUGH=1 bash scripts/test.sh -m long tests/browser runs it; with RUNMGR_SCREENSHOT=docs/tensorboard.png it also takes
the picture that the README shows.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import sys

import pytest
from logged_digits import log_every_step
from processes import run_ranks, values
from tensorboards import served

import runmgr
from runmgr.examples import digits

pytestmark = [
    pytest.mark.long,
    pytest.mark.needs("chromium"),
    pytest.mark.needs("playwright"),
]

SCREENSHOT = os.environ.get("RUNMGR_SCREENSHOT")
EPOCHS, STEPS_AN_EPOCH, DEATHS = 5, 38, (100, 150)
SWEEP = [(batch_size, lr) for batch_size in (32, 64) for lr in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)]
_CHROMIUM = (
    "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-proxy-server", "--disable-background-networking",
    "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost",
)  # fmt: skip


def _train(rank, root, options, die_after=None):
    """The demo's own main(); it dies without a word after a step that was not saved."""
    sys.argv = ["digits.py", *options]
    os.environ |= {"LOCAL_WORLD_SIZE": "1", "RUNMGR_CKPT_ROOT_DIR": str(root)}
    if die_after is not None:
        log_every_step()
        log = runmgr.Run.log_scalars

        def log_and_die(run, scalars, *, step):
            log(run, scalars, step=step)
            if step == die_after:
                run.tensorboard.flush()
                os.kill(os.getpid(), signal.SIGKILL)

        runmgr.Run.log_scalars = log_and_die
    digits.main()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    for batch_size, lr in SWEEP:
        values(run_ranks(1, _train, root, ["--epochs=2", f"--batch-size={batch_size}", f"--lr={lr}"]))
    options = [f"--epochs={EPOCHS}", "--experiment=killed", "--resume=latest"]
    for death in DEATHS:
        (outcome,) = run_ranks(1, _train, root, options, death)
        assert outcome.signal == signal.SIGKILL
    values(run_ranks(1, _train, root, options, 0))
    (info,) = runmgr.list_runs("killed", root)
    assert (info.status, info.attempt) == ("completed", 3)
    return root


@contextlib.contextmanager
def _page():
    """A page whose errors, and requests to anywhere but this host, fail the test."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=list(_CHROMIUM))
        page = browser.new_page(viewport={"width": 1250, "height": 900}, device_scale_factor=1)
        wrong = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: wrong.append(request.url) if _is_elsewhere(request.url) else None)
        page.set_default_timeout(60_000)
        try:
            yield page
        finally:
            browser.close()
        assert wrong == []


def _is_elsewhere(url):
    return not url.startswith(("http://localhost:", "data:", "blob:"))


def _curves(page, tag):
    """Return the points, in pixels, of each run's curve on the card of a tag."""
    lines = page.locator("card-view").filter(has_text=tag).first.locator("line-chart svg path[style*='fill: none']")
    lines.first.wait_for(state="attached")
    drawn = [line.get_attribute("d") for line in lines.all() if line.is_visible()]
    return [[tuple(map(float, point.split(","))) for point in re.split("[ML]", line)[1:]] for line in drawn if line]


@pytest.mark.timeout(400)
def test_a_training_that_was_killed_and_resumed_twice_is_drawn_as_one_clean_curve(trained):
    steps = list(range(1, EPOCHS * STEPS_AN_EPOCH + 1))
    with served(trained, "killed") as board, _page() as page:
        (name,) = board.wait_for_runs(1)
        board.until(lambda: board.scalars(name, "step"), lambda found: [step for step, _ in found] == steps)
        page.goto(f"{board.address}?darkMode=false&smoothing=0&forceSVG=true&tagFilter=step|val#timeseries")
        (curve,) = _curves(page, "step")
        assert len(curve) == len(steps)
        assert all(one[0] < next_[0] and one[1] > next_[1] for one, next_ in itertools.pairwise(curve))
        (accuracy,) = _curves(page, "accuracy")
        assert len(accuracy) == EPOCHS
        assert sorted(accuracy) == accuracy
        assert page.get_by_text(name).first.is_visible()


@pytest.mark.timeout(400)
def test_a_sweep_of_twelve_trainings_compares_in_the_hparams_table(trained):
    with served(trained, "digits") as board, _page() as page:
        names = board.wait_for_runs(len(SWEEP))
        accuracies = {name: board.scalars(name, "val/accuracy")[-1][1] for name in names}
        page.goto(f"{board.address}?darkMode=false#hparams")
        table = page.locator("tf-hparams-table-view vaadin-grid")
        for name in names:
            table.get_by_text(name, exact=True).wait_for()
        cells = [text.strip() for text in table.locator("vaadin-grid-cell-content").all_inner_texts()]
        rows = [cells[cells.index(name) :] for name in names]
        assert {"Trial ID", "batch_size", "lr", "val/accuracy", "test/accuracy"} <= set(cells)
        assert sum(name in cells for name in names) == len({*names}) == len([*filter(_is_name, cells)]) == 12
        assert [(float(row[2]), float(row[3])) for row in rows] == [(float(size), lr) for size, lr in SWEEP]
        for name, row in zip(names, rows, strict=True):
            assert any(_is_close(cell, accuracies[name]) for cell in row[4:14]), (row[:14], accuracies[name])
        if SCREENSHOT:
            _take_picture(page)
        page.goto(f"{board.address}?darkMode=false&smoothing=0&forceSVG=true&tagFilter=val#timeseries")
        assert len(_curves(page, "accuracy")) == len(SWEEP)


def _take_picture(page):
    page.set_viewport_size({"width": 1460, "height": 630})
    for constant in ("average", "epochs", "experiment"):
        page.locator("tf-hparams-query-pane paper-checkbox").filter(has_text=constant).first.click()
    page.mouse.move(0, 0)
    page.wait_for_timeout(2000)
    page.screenshot(path=SCREENSHOT)


def _is_name(text):
    return re.match(r"[\d_]+ batch_size=", text)  # two that began in one second have more digits


def _is_close(text, value):
    with contextlib.suppress(ValueError):
        return abs(float(text) - value) < 1e-3
    return False
