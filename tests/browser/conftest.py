"""A headless Chromium that opens a page as a reader would and reports what is wrong with it."""

import functools
import http.server
import json
import shutil
import threading
import time
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest

LOOK = (Path(__file__).parent / "look.js").read_text()
CONTROLS = ".noUi-handle, .widget-radio input:checked, .widget-play button:first-child"
READY = """
const views = document.querySelectorAll('script[type="application/vnd.jupyter.widget-view+json"]').length;
const drawn = document.querySelectorAll(".widget-subarea > *").length;
const typeset = !document.querySelector(".math") || document.querySelector("mjx-container");
return document.readyState === "complete" && drawn >= views && Boolean(typeset);
"""
SETTLED = """
const done = arguments[0], maths = window.MathJax && window.MathJax.startup && window.MathJax.startup.promise;
Promise.resolve(maths).then(() => requestAnimationFrame(() => setTimeout(done, 50)), done);
"""


class Visit(NamedTuple):
    """What was wrong with one page at one width: lists of str, all empty for a good page."""

    foreign: list  # requests to another host
    missing: list  # answers of 400 and more, and requests that failed
    errors: list  # console errors and uncaught exceptions
    formulas: list  # formulas that are not drawn
    widgets: list  # widgets that are not drawn
    wordless: list  # pictures and controls a screen reader cannot name
    sideways: list  # what makes the page scroll sideways
    dead: list  # controls that change nothing when moved by keyboard


@pytest.fixture(scope="session")
def browser():
    pytest.importorskip("selenium", reason="browser tests need selenium: pip install selenium")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("browser tests need chromium and chromedriver on the PATH")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "no-first-run",
        "disable-background-networking",
        "disable-sync",
        "disable-component-update",
        "disable-dev-shm-usage",
        "hide-scrollbars",
        "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # The service names the driver: left to itself, selenium would look for one on the network.
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    chrome.set_script_timeout(20)
    yield chrome
    chrome.quit()


@pytest.fixture(scope="session")
def serve():
    """serve(folder) -> address of a loopback server for it"""
    servers = []

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    def start(folder):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="session")
def visit(browser):
    """visit(address, width, patience) -> Visit; each page is opened once per width and session

    patience  seconds that widgets and formulas may take to appear
    """
    return functools.cache(functools.partial(_visit, browser))


def _visit(browser, address, width, patience):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    browser.get("about:blank")  # the page before falls silent, and what it said last is not this one's
    browser.get_log("performance"), browser.get_log("browser")
    browser.get(address)
    _until(lambda: browser.execute_script(READY), seconds=patience)
    browser.execute_async_script(SETTLED)
    found = browser.execute_script(LOOK, width)
    dead = _dead_controls(browser)
    foreign, missing = _network(browser, urlsplit(address).netloc)
    errors = [
        entry["message"]
        for entry in browser.get_log("browser")
        if entry["level"] == "SEVERE" and entry["source"] != "network"
    ]
    return Visit(foreign=foreign, missing=missing, errors=errors, dead=dead, **found)


def _until(happens, seconds):
    """Wait until happens() is true, at most so long; True if it was."""
    end = time.monotonic() + seconds
    while not (result := happens()) and time.monotonic() < end:
        time.sleep(0.02)
    return bool(result)


def _network(browser, own):
    """What the page asked for since the last call: (requests to other hosts, requests that went wrong)."""
    foreign, missing, asked = [], [], {}
    for entry in browser.get_log("performance"):
        event = json.loads(entry["message"])["message"]
        method, params = event["method"], event["params"]
        if method == "Network.requestWillBeSent":
            url = asked[params["requestId"]] = params["request"]["url"]
            if urlsplit(url).scheme in ("http", "https", "ws", "wss") and urlsplit(url).netloc != own:
                foreign.append(url)
        elif method == "Network.responseReceived" and params["response"]["status"] >= 400:
            missing.append(f"{params['response']['status']} {params['response']['url']}")
        elif method == "Network.loadingFailed" and not params.get("canceled"):
            missing.append(f"{params['errorText']} {asked.get(params['requestId'])}")
    return foreign, missing


def _dead_controls(browser):
    """Move every control of every explorer by keyboard; describe those that leave their picture as it was."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    dead = []
    for explorer in browser.find_elements(By.CSS_SELECTOR, ".explore"):
        states = explorer.find_element(By.CSS_SELECTOR, ".explore-states")
        controls = explorer.find_elements(By.CSS_SELECTOR, CONTROLS)
        for control in controls:
            before = states.get_property("innerHTML")
            changed = lambda: states.get_property("innerHTML") != before  # noqa: B023, E731
            if control.tag_name == "button":
                control.send_keys(Keys.SPACE)
                moved = _until(changed, seconds=4)
                control.send_keys(Keys.SPACE)
            else:
                moved = any(control.send_keys(key) or _until(changed, seconds=0.4) for key in _keys(control, Keys))
            if not moved:
                dead.append(control.get_attribute("aria-label") or control.get_attribute("outerHTML"))
    return dead


def _keys(control, Keys):
    """Keys that take a control through all its values: up to the last, then down to the first."""
    values = int(float(control.get_attribute("aria-valuemax") or 3)) + 1
    return [Keys.ARROW_RIGHT] * values + [Keys.ARROW_LEFT] * values
