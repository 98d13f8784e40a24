# SPDX-License-Identifier: Apache-2.0
"""Take docs/images/chat.png: the page of `megamoe serve` in headless Chromium, with the bundled model answering.

    python tools/chat_screenshot.py [FILE]

Needs Chromium and its driver (`make test-browser` installs them on Debian).
"""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
PROMPT = "def parse_header(line):\n    "


def main(path: pathlib.Path) -> None:
    """Serve, ask, wait for the answer, and write the picture."""
    sys.path.insert(0, str(ROOT))
    from tests.server.webdriver import ENTER, Browser

    server = subprocess.Popen(
        [sys.executable, "-m", "megamoe.cli", "serve", "--port", "0", "--speculative-tokens", "1"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        lines = (re.search(r"ready at (\S+)", line) for line in server.stdout)
        url = next(found[1] for found in lines if found)
        with Browser.start(width=1100, height=700) as browser:
            browser.open(url)
            browser.wait(lambda: "tiny" in browser.text("#about"))
            browser.click("#toggle")
            settings = {"mode": "text", "temperature": "0.6", "max_tokens": "96", "seed": "2"}
            for field, value in settings.items():
                browser.run(
                    "const f = document.getElementById(arguments[0]); f.value = arguments[1];"
                    "f.dispatchEvent(new Event('change'));",
                    field,
                    value,
                )
            browser.run("document.getElementById('prompt').value = arguments[0]", PROMPT)
            browser.type("#prompt", ENTER)
            browser.wait(lambda: bool(browser.elements("article .note")), 60)
            browser.screenshot(path)
    finally:
        server.terminate()
        server.wait(30)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "docs" / "images" / "chat.png"))
