"""`make play` in a real browser: the page loads, keys move the dream, R restarts it."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Where `make play` serves its page, set up already, with a folder of its own for its frames."""
    python = Path(sys.executable).parent
    play = tmp_path_factory.mktemp("play")
    command = ["make", "play", f"BIN={python}/", f"PLAY={play}", "PORT=0", "OPEN="]
    command += ["-o", ".venv/.installed"]  # never set up here
    log = play / "log"
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, start_new_session=True)
        while not (found := re.search(r"play at (http://127\.0\.0\.1:\d+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        yield found[1]
        os.killpg(process.pid, signal.SIGINT)
        process.wait(60)
    assert "Traceback" not in log.read_text()


@pytest.fixture
def page(address):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1000,1250"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.get(address)
    yield driver
    driver.quit()


def test_playing_in_a_browser(page):
    """A held key moves the dream and is named; R goes back to the first frame; the rate is within limits."""

    def text(name):
        return page.find_element(By.ID, name).text

    def frame():
        return int(text("frame").removeprefix("frame ") or -1)

    def picture():
        return page.execute_script("return document.getElementById('dream').toDataURL()")

    def until(condition):
        return WebDriverWait(page, 60, 0.02).until(lambda _: condition())

    keys = ActionChains(page)
    until(lambda: frame() > 0)
    keys.key_down(Keys.ARROW_RIGHT).perform()
    until(lambda: text("held") == "held: right")
    before, began = picture(), frame()
    until(lambda: frame() >= began + 30)
    assert picture() != before
    shown = re.fullmatch(r"(\d+) frames/s of at most (\d+); the model takes [\d.]+ ms a frame", text("rate"))
    assert 0 < int(shown[1]) <= int(shown[2]) == 15
    keys.key_up(Keys.ARROW_RIGHT).perform()
    until(lambda: text("held") == "held: stay")
    reached = frame()
    keys.send_keys("r").perform()
    until(lambda: frame() < reached)
    assert text("note") == "" and page.get_log("browser") == []
