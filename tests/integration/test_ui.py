"""Tests the page at /ui in a browser, with a stack of real processes."""

from __future__ import annotations

import os
import shutil
import time

import pytest
from mocks import mock_stack
from stacks import children, running_stack

from overfill.api import key_file as keys

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")),
        reason="needs Chromium and its driver: apt-get install chromium chromium-driver",
    ),
]


@pytest.fixture(scope="module")
def browser():
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    options = ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "window-size=1280,800"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options, ChromeService(shutil.which("chromedriver")))
    driver.set_script_timeout(30)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def stack(tiny_pair):
    with running_stack(tiny_pair, decode=2, http=0) as (stack, _):
        yield stack, stack.spec.openai_urls(stack.placed.addresses)[0].removesuffix("/v1")


def until(browser, script, what, seconds=60.0):
    """Waits until ``script``, a JavaScript expression, is not empty; returns its value."""
    deadline = time.monotonic() + seconds
    while not (value := browser.execute_script(f"return {script}")):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)
    return value


def ask(browser, text, most=40):
    browser.execute_script(f"document.getElementById('max-tokens').value = {most}")
    browser.find_element("id", "prompt").send_keys(text, "\n")


def test_an_answer_streams_and_its_parts_add_up(browser, stack):
    browser.get(f"{stack[1]}/ui")
    until(browser, "document.getElementById('model').textContent", "the status arrived")
    # Records every text that the answer has had.
    browser.execute_script("""
        window.texts = new Set();
        new MutationObserver(() => {
            const shown = document.querySelector('.turn:last-child .text');
            if (shown) texts.add(shown.textContent);
        }).observe(document.getElementById('log'), {childList: true, subtree: true, characterData: true});
    """)
    ask(browser, "Tell me about a river.")
    bar = until(
        browser,
        "(b => b && {ttft: +b.dataset.ttft, parts: [...b.children].map(p => +p.dataset.ms),"
        " names: [...b.children].map(p => p.dataset.part), width: b.clientWidth,"
        " widths: [...b.children].map(p => p.getBoundingClientRect().width)})"
        "(document.querySelector('.details .bar'))",
        "the answer is complete",
    )
    assert browser.execute_script("return texts.size") > 3, "the text arrived in parts"
    assert bar["names"][-1] == "unattributed"
    assert sum(bar["parts"]) == pytest.approx(bar["ttft"], rel=1e-3)
    assert all(part >= 0 for part in bar["parts"])
    assert sum(bar["widths"]) == pytest.approx(bar["width"], abs=len(bar["widths"]))
    cut = browser.execute_script("return document.querySelector('.cut').textContent")
    assert "Max tokens" in cut, "the page reports the limit of 40 tokens"
    facts = browser.execute_script("return document.querySelector('.facts').textContent")
    assert "tokens/s" in facts
    assert "prefill-0 (overfill " in facts
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_a_new_chat_begins_without_the_answer_that_it_interrupted(browser, tiny_pair):
    with mock_stack(tiny_pair, decode_settings={"step": 0.1}) as stack:
        browser.get(f"{stack.url}/ui")
        until(browser, "document.getElementById('model').textContent", "the status arrived")
        browser.execute_script("""
            window.asked = [];
            const fetched = window.fetch;
            window.fetch = (url, options) => {
                if (options?.body) asked.push(JSON.parse(options.body).messages);
                return fetched(url, options);
            };
        """)
        ask(browser, "Tell me about a river.", most=300)
        until(browser, "document.querySelector('.turn:last-child .text')?.textContent.length > 3", "the answer began")
        browser.find_element("id", "clear").click()
        until(browser, "!document.getElementById('send').disabled", "the answer has ended")
        ask(browser, "Hi", most=5)
        until(browser, "document.querySelector('.details') !== null", "the answer is complete")
        assert browser.execute_script("return asked[1]") == [{"role": "user", "content": "Hi"}]
        assert browser.execute_script("return document.querySelectorAll('.turn').length") == 2


def test_reasoning_is_shown_apart_from_the_answer(browser):
    script = [{"text": "<think>Hm,\nso.</think>Yes.<|im_end|>"}]
    with mock_stack("mock", workers={"script": script}, reasoning_parser="qwen3") as stack:
        browser.get(f"{stack.url}/ui")
        until(browser, "document.getElementById('model').textContent", "the status arrived")
        ask(browser, "Is it so?")
        until(browser, "document.querySelector('.details') !== null", "the answer is complete")
        shown = [browser.find_element("css selector", f".turn:last-child .{name}").text for name in ("thought", "text")]
        assert shown == ["Hm,\nso.", "Yes."]


def test_the_page_shows_a_killed_worker(browser, stack):
    browser.get(f"{stack[1]}/ui")
    state = "(w => w && w.querySelector('.state').textContent)(document.querySelector('[data-worker=decode-1]'))"
    until(browser, f"{state} === 'ready'", "both decode workers are there")
    victim = next(child for child in children(stack[0], "decode") if child.name == "decode-1")
    killed = time.monotonic()
    os.kill(victim.pid, 9)
    until(browser, f"{state} === 'gone'", "the page shows it", seconds=20)  # within 2 s on an idle machine
    print(f"a killed worker showed after {time.monotonic() - killed:.2f} s")


def test_the_chat_asks_the_chosen_tier_and_shows_which_wrote_the_answer(browser, tiny_pair):
    with mock_stack(tiny_pair, tiers={"fast": tiny_pair, "default": tiny_pair}) as stack:
        browser.get(f"{stack.url}/ui")
        until(browser, "!document.getElementById('tier-field').hidden", "the tiers are listed")
        tier = "document.getElementById('tier')"
        assert browser.execute_script(f"return {tier}.selectedOptions[0].text") == "default"
        browser.execute_script(f"{tier}.value = [...{tier}.options].find(o => o.text === 'fast').value")
        ask(browser, "Hi", most=5)
        facts = until(browser, "document.querySelector('.facts')?.textContent", "the answer is complete")
        assert "→ decode-fast-0" in facts
        assert "tier fast" in facts


def test_the_page_asks_for_a_key_once_where_one_is_needed(browser, tiny_pair, tmp_path):
    file = tmp_path / "keys.json"
    key = keys.create(file, "ui")
    with running_stack(tiny_pair, http=0, api_keys=file) as (stack, _):
        browser.get(f"{stack.spec.openai_urls(stack.placed.addresses)[0].removesuffix('/v1')}/ui")
        problem = "document.getElementById('problem').textContent"
        until(browser, f"{problem}.startsWith('This server requires an API key')", "the page asks for a key")
        browser.find_element("id", "key").send_keys("wrong", "\n")
        until(browser, f"{problem} === 'The API key is not valid.'", "the page says that the key is wrong")
        browser.find_element("id", "key").clear()
        browser.find_element("id", "key").send_keys(key, "\n")
        until(browser, "document.querySelector('[data-worker=decode-0]') !== null", "the workers are shown")
        until(browser, f"{problem} === ''", "nothing is the matter")
        ask(browser, "Hi", most=5)
        until(browser, "document.querySelector('.details') !== null", "the answer is complete")
        browser.refresh()
        until(browser, "document.querySelector('[data-worker=decode-0]') !== null", "the tab has kept the key")
