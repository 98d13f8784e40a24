# SPDX-License-Identifier: Apache-2.0
"""A browser for tests: Chromium through its driver's WebDriver protocol, spoken with the standard library.

with Browser.start() as browser:
    browser.open("http://127.0.0.1:8000/")
    browser.type("#prompt", "Hello\\n")
    browser.wait(lambda: "Hi" in browser.text("#log"))
"""

from __future__ import annotations

import base64
import contextlib
import json
import pathlib
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

ENTER, ESCAPE, TAB, SPACE = "\ue007", "\ue00c", "\ue004", " "
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's name for a reference to an element


class Browser:
    """One page in headless Chromium."""

    def __init__(self, driver_url: str, *, width: int, height: int, is_dark: bool) -> None:
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        arguments += [f"--window-size={width},{height}", "--hide-scrollbars", "--lang=en"]
        arguments += ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if is_dark else []
        capabilities = {
            "browserName": "chrome",
            "goog:chromeOptions": {"args": arguments, "binary": find("chromium", "google-chrome", "chrome")},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        self._url = driver_url
        session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})
        self._url = f"{driver_url}/session/{session['sessionId']}"

    @classmethod
    @contextlib.contextmanager
    def start(cls, *, width: int = 1100, height: int = 760, is_dark: bool = False) -> Iterator[Browser]:
        """Start a driver and a browser, and end both."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        driver = subprocess.Popen(
            [find("chromedriver"), f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            url = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + 20
            while True:
                try:
                    urllib.request.urlopen(f"{url}/status", timeout=2).read()
                    break
                except OSError:
                    assert time.monotonic() < deadline and driver.poll() is None, "the driver did not start"
                    time.sleep(0.05)
            browser = cls(url, width=width, height=height, is_dark=is_dark)
            try:
                yield browser
            finally:
                browser._call("DELETE", "")
        finally:
            driver.terminate()
            driver.wait(10)

    def open(self, url: str) -> None:
        """Load a page."""
        self._call("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """Run JavaScript; `return` gives the result."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def elements(self, selector: str) -> list[str]:
        """Return references to the elements a CSS selector finds."""
        found = self._call("POST", "/elements", {"using": "css selector", "value": selector})
        return [one[ELEMENT] for one in found]

    def element(self, selector: str) -> str:
        """Return the one element."""
        found = self.elements(selector)
        assert len(found) == 1, f"{len(found)} elements are {selector}"
        return found[0]

    def text(self, selector: str) -> str:
        """Return the visible text of all elements that match."""
        return "\n".join(str(self._call("GET", f"/element/{one}/text")) for one in self.elements(selector))

    def click(self, selector: str) -> None:
        """Click an element; it must be visible and nothing may cover it."""
        self._call("POST", f"/element/{self.element(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        """Type into an element."""
        self._call("POST", f"/element/{self.element(selector)}/value", {"text": text})

    def clear(self, selector: str) -> None:
        """Empty a field."""
        self._call("POST", f"/element/{self.element(selector)}/clear", {})

    def press(self, *keys: str) -> None:
        """Press keys wherever the focus is."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def label(self, reference: str) -> str:
        """Return what a screen reader calls an element."""
        return str(self._call("GET", f"/element/{reference}/computedlabel"))

    def is_shown(self, selector: str) -> bool:
        """Return whether the one element can be seen."""
        return bool(self._call("GET", f"/element/{self.element(selector)}/displayed"))

    def complaints(self) -> list[str]:
        """Return what the browser logged since the last time, errors and refusals by policy included."""
        return [entry["message"] for entry in self._call("POST", "/se/log", {"type": "browser"})]

    def screenshot(self, path: pathlib.Path) -> None:
        """Write a PNG of the window."""
        path.write_bytes(base64.b64decode(self._call("GET", "/screenshot")))

    def wait(self, condition: Callable[[], Any], seconds: float = 10.0) -> None:
        """Wait for something that must happen."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"it did not happen; the page says:\n{self.text('body')}"
            time.sleep(0.02)

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{method} {path}: {json.load(error)['value']['message']}") from error


def find(*names: str) -> str:
    """Return the path of a program that must be there; a missing browser fails a test, it does not skip it."""
    path = next((path for name in names if (path := shutil.which(name))), None)
    assert path is not None, f"{names[0]} is not installed; on Debian: apt-get install chromium chromium-driver"
    return path
