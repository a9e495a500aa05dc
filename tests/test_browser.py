"""The explorer in a browser: JupyterLab on this machine, moved by keyboard and mouse. Skipped where there is none.

`python tests/test_browser.py FOLDER` does the same, says how long each answer took, and leaves screenshots there.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
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
    with (folder / "lab.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options], env=environment, stdout=log, stderr=log, cwd=folder
        )
        try:
            until = time.monotonic() + 60
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                assert server.poll() is None and time.monotonic() < until, (folder / "lab.log").read_text()[-2000:]
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/lab/tree/10_explorer.ipynb?reset"
        finally:
            server.terminate()
            server.wait(20)


class Watch:
    """A panel on the page: moves its controls, and waits for the answers."""

    def __init__(self, page, number: int):
        self.panel = page.locator(".jp-OutputArea-output .widget-vbox").nth(number)
        self.picture = self.panel.locator("img")
        self.status = self.panel.locator('[role="status"]')

    def wait_until_done(self):
        self.status.filter(has_text="steps").filter(has_not_text="Refining").wait_for(timeout=60_000)

    def after(self, move) -> float:
        """Seconds from the move to a new picture. Also waits for the last answer."""
        before = self.picture.get_attribute("src")
        began = time.perf_counter()
        move()
        while self.picture.get_attribute("src") == before:
            assert time.perf_counter() - began < 30, "no new picture in 30 s"
            time.sleep(0.01)
        seconds = time.perf_counter() - began
        self.wait_until_done()
        return seconds


def explore(folder: Path, pictures: Path | None = None) -> dict[str, float]:
    """Open notebook 10, run all of it, move eps and s. Returns the seconds to each first answer; raises on errors."""
    from playwright.sync_api import sync_playwright

    seconds, errors = {}, []
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
        attack = Watch(page, 0)
        attack.panel.scroll_into_view_if_needed()
        attack.wait_until_done()
        eps = attack.panel.locator(".noUi-handle").nth(0)
        eps.focus()
        seconds["eps by keyboard"] = attack.after(lambda: page.keyboard.press("ArrowRight"))
        assert "17.00" in attack.panel.inner_text() or "17" in attack.panel.inner_text()
        box = eps.bounding_box()

        def drag():
            page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
            page.mouse.down()
            page.mouse.move(box["x"] + 60, box["y"] + box["height"] / 2, steps=12)
            page.mouse.up()

        words = attack.status.inner_text()
        seconds["eps by mouse"] = attack.after(drag)
        assert attack.status.inner_text() != words
        if pictures:
            page.screenshot(path=pictures / "attack.png")
        sharing = Watch(page, 1)
        sharing.panel.scroll_into_view_if_needed()
        sharing.wait_until_done()
        sharing.panel.locator(".noUi-handle").nth(0).focus()
        seconds["s by keyboard"] = sharing.after(lambda: page.keyboard.press("ArrowRight"))
        assert "Shared by 16" in sharing.status.inner_text()
        if pictures:
            page.screenshot(path=pictures / "sharedness.png")
        trade = Watch(page, 2)
        trade.panel.scroll_into_view_if_needed()
        trade.status.filter(has_text="nearest model that was run").wait_for(timeout=60_000)
        if pictures:
            page.wait_for_timeout(1000)
            page.screenshot(path=pictures / "tradeoff.png")
        browser.close()
    known = ("favicon", "manifest")  # the server's own icons
    assert [error for error in errors if not any(word in error for word in known)] == []
    return seconds


@pytest.mark.timeout(400)
def test_the_explorer_answers_keyboard_and_mouse(tmp_path):
    pytest.importorskip("playwright", reason="playwright, which drives a browser, is not installed")
    if BROWSER is None:
        pytest.skip("no Chromium on this machine")
    assert set(explore(tmp_path)) == {"eps by keyboard", "eps by mouse", "s by keyboard"}


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    for name, value in explore(target / "work", target).items():
        print(f"{name}: first answer after {value:.2f} s")
