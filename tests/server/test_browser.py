# SPDX-License-Identifier: Apache-2.0
"""The page at / in headless Chromium. Run by `make test-browser`; without a browser these tests fail."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator

import httpx2
import pytest

from megamoe.models.deepseek_v4.chat import CONTROL_TOKENS

from .fakes import FakeEngine, RunningServer, echo_of_prompt, make_state, running
from .test_chat import prompt_of, says
from .webdriver import ENTER, ESCAPE, SPACE, TAB, Browser

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def shared_browser() -> Iterator[Browser]:
    with Browser.start() as browser:
        yield browser


@pytest.fixture
def browser(shared_browser: Browser, server: RunningServer) -> Iterator[Browser]:
    """The page of the server, with nothing stored; no test may leave a complaint of the browser behind."""
    shared_browser.open(server.url)
    shared_browser.run("localStorage.clear(); sessionStorage.clear();")
    shared_browser.open(server.url)
    shared_browser.wait(lambda: "fake" in shared_browser.text("#about"))
    shared_browser.complaints()
    yield shared_browser
    assert shared_browser.complaints() == []


def is_done(browser: Browser) -> bool:
    return not browser.elements("article.busy") and browser.is_shown("#send")


def test_a_conversation(server: RunningServer, browser: Browser) -> None:
    assert browser.text("#about") == "fake · recipe exact · context 3000"
    says(server, "Hi there 😀.\n\n```python\ndef f():\n    pass\n```\nDone.")
    browser.type("#prompt", "Hello" + ENTER)
    browser.wait(lambda: is_done(browser))
    assert browser.text("article.user .text") == "Hello"
    assert browser.text("article.assistant .text").startswith("Hi there 😀.")
    assert browser.text("article.assistant pre") == "def f():\n    pass"
    assert "tokens/s" in browser.text("article.assistant .note") and "first after" in browser.text("article .note")
    assert browser.run("return document.activeElement.id") == "prompt" and browser.run("return form.prompt.value") == ""
    says(server, "Again.")
    browser.type("#prompt", "And now?" + ENTER)
    browser.wait(lambda: "Again." in browser.text("#log") and is_done(browser))
    assert "Hello<｜Assistant｜></think>Hi there" in prompt_of(server) and "And now?" in prompt_of(server)
    browser.click("#new")
    assert browser.text("#log") == ""
    browser.type("#prompt", "Fresh" + ENTER)
    browser.wait(lambda: len(browser.elements("article")) == 2 and is_done(browser))
    assert prompt_of(server) == "<｜User｜>Fresh<｜Assistant｜></think>"


def test_text_arrives_while_it_is_written(server: RunningServer, browser: Browser) -> None:
    server.engine.script = lambda prompt, params: server.tokenizer.encode("word " * 30)
    server.engine.delay_s = 0.02
    browser.type("#prompt", "Go" + ENTER)
    browser.wait(lambda: browser.text("article.assistant .text").count("word") > 3)
    assert browser.elements("article.busy") and browser.is_shown("#stop") and not browser.is_shown("#send")
    browser.wait(lambda: is_done(browser))
    assert browser.text("article.assistant .text").count("word") == 30


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop(server: RunningServer, browser: Browser, how: str) -> None:
    server.engine.script = lambda prompt, params: [10] * 10_000
    server.engine.delay_s = 0.02
    browser.type("#prompt", "Go" + ENTER)
    browser.wait(lambda: len(browser.text("article.assistant .text")) > 2)
    browser.click("#stop") if how == "button" else browser.press(ESCAPE)
    browser.wait(lambda: is_done(browser))
    server.wait_until(lambda: len(server.engine.aborted) == 1)
    assert "Stopped." in browser.text("article.assistant .note") and not server.engine.has_work()


def test_reasoning_is_shown_apart(server: RunningServer, browser: Browser) -> None:
    says(server, "Let me think.</think>42")
    browser.click("#toggle")
    browser.click("#thinking")
    browser.type("#prompt", "Question" + ENTER)
    browser.wait(lambda: is_done(browser))
    assert browser.text("article.assistant .text") == "42"
    assert browser.text("details.reasoning summary") == "Thoughts"
    assert browser.run("return document.querySelector('details.reasoning').open") is False
    browser.click("details.reasoning summary")
    assert browser.text("details.reasoning div") == "Let me think."


def test_settings_reach_the_engine_and_are_kept(server: RunningServer, browser: Browser) -> None:
    says(server, "ok")
    browser.click("#toggle")
    for field, value in {"temperature": "0.3", "top_p": "0.8", "max_tokens": "33", "seed": "7"}.items():
        browser.clear(f"#{field}")
        browser.type(f"#{field}", value)
    browser.type("#system", "Be brief.")
    browser.type("#prompt", "Hello" + ENTER)
    browser.wait(lambda: is_done(browser) and bool(browser.elements("article.assistant")))
    params = server.engine.params[-1]
    assert (params.temperature, params.top_p, params.max_tokens, params.seed) == (0.3, 0.8, 33, 7)
    assert prompt_of(server).startswith("Be brief.<｜User｜>Hello")
    browser.open(server.url)
    assert browser.run("return [temperature.value, system.value, seed.value]") == ["0.3", "Be brief.", "7"]


def test_a_text_is_continued_as_it_is(server: RunningServer, browser: Browser) -> None:
    browser.click("#toggle")
    browser.run("mode.value = 'text'; mode.dispatchEvent(new Event('change'));")
    assert not browser.is_shown("#system")
    browser.type("#prompt", "def f(" + ENTER)
    browser.wait(lambda: is_done(browser) and bool(browser.elements("article.code")))
    assert server.engine.prompts[-1] == server.state.encoder.encode("def f(")


def test_what_the_model_writes_is_never_markup(server: RunningServer, browser: Browser) -> None:
    attack = "<img src=x onerror='window.owned=1'><script>window.owned=1</script>```<b>x</b>```"
    says(server, attack)
    browser.type("#prompt", attack + ENTER)
    browser.wait(lambda: is_done(browser) and bool(browser.elements("article.assistant")))
    assert browser.run("return window.owned") is None
    assert not browser.elements("#log img, #log script, #log b")
    assert browser.text("article.user .text") == attack


def test_an_error_is_shown_and_does_not_stay_in_the_conversation(server: RunningServer, browser: Browser) -> None:
    browser.click("#toggle")
    browser.clear("#temperature")
    browser.type("#temperature", "99")
    browser.type("#prompt", "First" + ENTER)
    browser.wait(lambda: is_done(browser) and bool(browser.elements("[role=alert]")))
    assert "less than or equal to 2" in browser.text("[role=alert]")
    assert any("400" in line for line in browser.complaints())  # the browser logs the status
    browser.clear("#temperature")
    browser.type("#temperature", "1")
    browser.type("#prompt", "Second" + ENTER)
    browser.wait(lambda: len(browser.elements("article.assistant .note")) == 1 and is_done(browser))
    assert "First" not in prompt_of(server)


def test_the_key(v4_directory: pathlib.Path, shared_browser: Browser) -> None:
    engine = FakeEngine(echo_of_prompt)
    with running(make_state(v4_directory, engine, api_key="sesame"), engine) as server:
        shared_browser.open(server.url)
        shared_browser.wait(lambda: "key is missing" in shared_browser.text("#about"))
        shared_browser.click("#toggle")
        shared_browser.type("#key", "sesame" + TAB)
        shared_browser.wait(lambda: "fake" in shared_browser.text("#about"))
        stored = shared_browser.run("return [localStorage.megamoe, sessionStorage['megamoe-key']]")
        assert "sesame" not in stored[0] and stored[1] == "sesame"
        says(server, "Open.")
        shared_browser.type("#prompt", "Hello" + ENTER)
        shared_browser.wait(lambda: "Open." in shared_browser.text("#log"))
    shared_browser.complaints()


def test_everything_works_by_keyboard(server: RunningServer, browser: Browser) -> None:
    says(server, "Yes.")
    assert browser.run("return document.activeElement.id") == "prompt"
    browser.press("H", "i", ENTER)
    browser.wait(lambda: "Yes." in browser.text("#log") and is_done(browser))
    browser.run("document.querySelector('#new').focus()")
    browser.press(TAB, SPACE)
    assert browser.is_shown("#settings") and browser.run("return toggle.getAttribute('aria-expanded')") == "true"
    order = []
    for _ in range(14):
        browser.press(TAB)
        order.append(browser.run("return document.activeElement.id"))
    wanted = ["mode", "system", "thinking", "temperature", "top_p", "max_tokens", "seed", "key", "prompt", "send"]
    assert [one for one in order if one in wanted][: len(wanted)] == wanted


def test_every_control_has_a_name_and_text_has_contrast(server: RunningServer, browser: Browser) -> None:
    says(server, "Yes.")
    browser.click("#toggle")
    browser.type("#prompt", "Hi" + ENTER)
    browser.wait(lambda: is_done(browser) and bool(browser.elements("article.assistant .note")))
    controls = browser.elements("button:not([hidden]), input, select, textarea")
    assert len(controls) > 10 and all(browser.label(one) for one in controls)
    assert browser.run("return document.documentElement.lang") == "en"
    ratios = browser.run(CONTRAST)
    assert len(ratios) > 20
    assert [line for line in ratios if line[0] < 4.5] == []


# Contrast ratio (WCAG 2) of every element that has text of its own, against the nearest background behind it.
CONTRAST = """
const parse = (c) => c.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
  .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = (e) => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
  if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
return [...document.querySelectorAll('body *')].filter((e) => e.offsetParent && e.tagName !== 'OPTION' &&
  [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())).map((e) => {
  const [a, b] = [light(parse(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
  return [(a + 0.05) / (b + 0.05), e.tagName + '.' + e.className + ' ' + e.textContent.slice(0, 20)]; });
"""


def test_dark_pages_have_contrast_too(server: RunningServer) -> None:
    with Browser.start(is_dark=True) as browser:
        browser.open(server.url)
        browser.click("#toggle")
        dark = browser.run("return getComputedStyle(document.body).backgroundColor")
        assert dark == "rgb(18, 21, 26)"
        assert [line for line in browser.run(CONTRAST) if line[0] < 4.5] == []


def test_a_small_screen(server: RunningServer) -> None:
    with Browser.start(width=500, height=800) as browser:
        browser.open(server.url)
        browser.click("#toggle")
        browser.type("#prompt", "Hi" + ENTER)
        browser.wait(lambda: bool(browser.elements("article.assistant .note")))
        assert browser.run("return document.documentElement.scrollWidth <= innerWidth")


def test_nothing_comes_from_elsewhere(server: RunningServer, browser: Browser) -> None:
    loaded = browser.run("return performance.getEntriesByType('resource').map((one) => one.name)")
    assert loaded and all(name.startswith((server.url, "data:")) for name in loaded)
    for path in ("/", "/docs"):
        policy = httpx2.get(server.url + path).headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy


def test_the_description_of_the_api(server: RunningServer, browser: Browser) -> None:
    browser.open(f"{server.url}/docs")
    browser.wait(lambda: "/v1/chat/completions" in browser.text("body"))
    paths = httpx2.get(f"{server.url}/openapi.json").json()["paths"]
    assert all(path in browser.text("main") for path in paths)
    browser.run("document.querySelector('details').open = true")
    assert "ChatRequest" in browser.text("details") and "Retry-After" in browser.text("details")
    assert json.dumps(CONTROL_TOKENS[0]) not in browser.text("body")
