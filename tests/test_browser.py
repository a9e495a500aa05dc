"""The explorer in a browser: JupyterLab on this machine, moved by keyboard and mouse. Skipped where there is none.

`python tests/test_browser.py FOLDER` does so five times, says how long the answers took, and leaves screenshots there.
"""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).resolve().parent.parent
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BUSY = re.compile("computing|Refining")
EXTENSIVE = 120_000  # ms: a notebook's kernel starts and runs all cells within
SETTINGS = {  # all cells stay on the page, and nothing pops up
    "@jupyterlab/notebook-extension/tracker.jupyterlab-settings": '{"windowingMode": "none"}',
    "@jupyterlab/apputils-extension/notification.jupyterlab-settings": '{"fetchNews": "false"}',
}


@contextlib.contextmanager
def jupyterlab(folder: Path):
    """JupyterLab that shows the notebooks of a copy; yields its address."""
    (folder / "lab").mkdir(parents=True)
    shutil.copy(ROOT / "notebooks" / "10_explorer.ipynb", folder / "lab")
    for name, setting in SETTINGS.items():
        (folder / "settings" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "settings" / name).write_text(setting)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"SATLIB_HOME": str(ROOT), "PYTHONPATH": str(ROOT), "JUPYTER_CONFIG_DIR": str(folder)}
    options = [f"--ServerApp.root_dir={folder / 'lab'}", f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    options += ["--ServerApp.token=", "--ServerApp.ip=127.0.0.1", "--no-browser", "--allow-root"]
    options += [f"--LabApp.workspaces_dir={folder / 'workspaces'}", f"--LabApp.user_settings_dir={folder / 'settings'}"]
    with (folder / "jupyter.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options], env=environment, stdout=log, stderr=log, cwd=folder
        )
        try:
            until = time.monotonic() + 60
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                assert server.poll() is None and time.monotonic() < until, (folder / "jupyter.log").read_text()[-2000:]
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/lab/tree/10_explorer.ipynb?reset"
        finally:
            server.terminate()
            server.wait(20)


class Watch:
    """A panel on the page: moves its controls, and waits for the answers."""

    def __init__(self, page, number: int):
        self.number = number
        self.panel = page.locator(".jp-OutputArea-output .widget-vbox").nth(number)
        self.picture = self.panel.locator("img")
        self.status = self.panel.locator('[role="status"]')

    def wait_until_done(self):
        self.status.filter(has_text=" ").filter(has_not_text=BUSY).wait_for(timeout=60_000)

    def handle(self, place: int):
        """The handle of the panel's slider at this place."""
        return self.panel.locator(".noUi-handle").nth(place)

    def value(self, place: int) -> str:
        """What is written beside it, as the answers write it."""
        return f"{float(self.panel.locator('.widget-readout').nth(place).inner_text()):g}"

    def after(self, move, words) -> float:
        """Seconds from the end of a move to the first picture that is said to show words(). Waits for the last, too."""
        move()
        began = time.perf_counter()
        wanted = words()
        while wanted not in (self.picture.get_attribute("alt") or ""):
            assert time.perf_counter() - began < 30, f"no picture of {wanted!r} in 30 s"
            time.sleep(0.01)
        seconds = time.perf_counter() - began
        self.wait_until_done()
        return seconds


def explore(folder: Path, pictures: Path | None = None, *, times: int = 1) -> dict[str, list[float]]:
    """Open notebook 10, run all of it, move eps and s, choose a model. Returns the seconds to each first answer; raises
    on errors."""
    from playwright.sync_api import sync_playwright

    seconds, errors = defaultdict(list), []
    with jupyterlab(folder) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1500, "height": 1000})
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
        page.goto(address, timeout=EXTENSIVE)
        page.locator(".jp-Notebook").wait_for(timeout=EXTENSIVE)
        page.get_by_text("| Idle").wait_for(timeout=EXTENSIVE)  # the kernel is there
        page.get_by_text("Run", exact=True).first.click()
        page.get_by_text("Run All Cells", exact=True).click()
        page.locator(".widget-vbox").first.wait_for(timeout=EXTENSIVE)
        page.get_by_text("checked: shared perturbations fit").first.wait_for(timeout=EXTENSIVE)
        page.wait_for_timeout(1000)
        page.get_by_text("| Idle").wait_for(timeout=EXTENSIVE)  # the twins below the panels compute, too

        def press(watch: Watch, place: int, time: int):
            watch.handle(place).focus()
            page.keyboard.press("ArrowLeft" if time % 2 else "ArrowRight")

        def drag(watch: Watch, place: int, time: int):
            box = watch.handle(place).bounding_box()
            x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
            page.mouse.move(x, y)
            page.mouse.down()
            page.mouse.move(x - 60 if time % 2 else x + 60, y, steps=12)
            page.mouse.up()

        attack, sharing, trade = (Watch(page, number) for number in range(3))
        for watch in (attack, sharing, trade):
            watch.panel.scroll_into_view_if_needed()
            watch.wait_until_done()
        for n in range(times):
            for name, move in (("keyboard", press), ("mouse", drag)):
                took = attack.after(partial(move, attack, 0, n), lambda: f"eps = {attack.value(0)}:")
                seconds[f"eps by {name}"].append(took)
            took = sharing.after(partial(press, sharing, 0, n), lambda: f"shared by {sharing.value(0)}:")
            seconds["s by keyboard"].append(took)
            took = trade.after(partial(press, trade, 0, n), lambda: f"eps = {trade.value(0)}, sigma")
            seconds["eps of the trade-off by keyboard"].append(took)
        attack.panel.scroll_into_view_if_needed()
        models = attack.panel.locator("select").first
        for title in models.locator("option").all_inner_texts()[1:]:
            took = attack.after(
                partial(models.select_option, title), lambda title=title: f"{title}, eps".replace("\xa0", " ")
            )
            seconds["model, loaded for the first time" if "shapes" in title else "model of scenes, likewise"].append(
                took
            )
        if pictures:
            for watch in (attack, sharing, trade):
                watch.panel.scroll_into_view_if_needed()
                page.wait_for_timeout(500)
                page.screenshot(path=pictures / f"{('attack', 'sharedness', 'tradeoff')[watch.number]}.png")
        browser.close()
    known = ("favicon", "manifest")  # the server's own icons
    assert [error for error in errors if not any(word in error for word in known)] == []
    return seconds


@pytest.mark.timeout(400)
def test_the_explorer_answers_keyboard_and_mouse(tmp_path):
    pytest.importorskip("playwright", reason="playwright, which drives a browser, is not installed")
    if BROWSER is None:
        pytest.skip("no Chromium on this machine")
    moves = {"eps by keyboard", "eps by mouse", "s by keyboard", "eps of the trade-off by keyboard"}
    assert moves <= set(explore(tmp_path))


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    for name, found in explore(target / "work", target, times=5).items():
        spread = f"{min(found):.2f} to {max(found):.2f} s, median {median(found):.2f} s of {len(found)}"
        print(f"{name}: first answer after {spread}")
