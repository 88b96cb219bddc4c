"""The page at / in a real browser: clicks fork and roll back, and hostile text stays text."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.keys import Keys

from flashrt.client import Client
from flashrt.serve.access import Access
from flashrt.serve.wire.page import FILES, FOLDER
from tests.seeing import FILE, write
from tests.serve.wire.browsing import Page, open_browser
from tests.serve.wire.running import SEARCH, WALK, Running

HOSTILE = "<script>window.struck = 1</script><img src=x onerror='window.struck = 2'>"
MORE = "start in column one row two . east where am i ?"


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    driver = open_browser()
    yield driver
    driver.quit()


@pytest.mark.browser
def test_fork_and_rollback_by_clicks(browser: webdriver.Chrome, server: Running) -> None:
    """Fault: a click does nothing, another branch gets the turn, or the tree is drawn wrong."""
    page = Page(browser, server.url)
    page.find("#create-name").send_keys("clicks" + Keys.ENTER)
    page.wait(lambda: [n["here"] for n in page.nodes()] == [True])
    page.find("#system").send_keys(SEARCH)
    page.say(WALK)
    page.say(MORE)
    start, first, second = page.nodes()
    assert (start["title"], first["title"], second["title"]) == ("start", WALK, MORE)
    assert second["badges"] == ["clicks"]
    assert page.talk()[:2] == [SEARCH, WALK]

    page.click(f'[data-node="{first["id"]}"]')
    page.wait(lambda: len(page.talk()) == 3)  # system, user, assistant
    page.click("#back")
    page.wait(lambda: page.nodes()[1]["here"])
    assert [n["id"] for n in page.nodes()] == [start["id"], first["id"], second["id"]]
    page.say("where is the red box ?")
    third = page.nodes()[3]
    assert (third["level"], third["here"]) == (second["level"], True)

    page.click(f'[data-node="{second["id"]}"]')
    page.click("#fork")
    page.wait(lambda: page.nodes()[2]["badges"] == ["clicks fork 1"])
    page.say(WALK)
    fourth = page.nodes()[4]
    assert (fourth["level"], fourth["here"]) == (second["level"] + 1, True)
    assert page.nodes()[3]["badges"] == ["clicks"]

    with Client(server.url) as client:
        found = {one.name: one for one in client.sessions()}
        assert found["clicks"].tip == third["id"]
        assert found["clicks fork 1"].tip == fourth["id"]
        parents = {n["id"]: n["parent"] for n in found["clicks fork 1"].tree()["nodes"]}
        assert parents[fourth["id"]] == second["id"]
        # What others do is seen without a click.
        found["clicks fork 1"].say(MORE, max_tokens=4)
        page.wait(lambda: len(page.nodes()) == 6)
    starts = page.driver.execute_script(
        "return [...document.querySelectorAll('#turns tr')].map((r) => r.cells[2].textContent)"
    )
    assert starts[0].startswith("warm")
    assert page.logs() == []


@pytest.mark.browser
def test_hostile_text_stays_text(browser: webdriver.Chrome, server: Running) -> None:
    """Fault: a message, a name or a reply is put into the page as HTML."""
    with Client(server.url) as client:
        session = client.session(HOSTILE)
        session.say([{"role": "system", "content": HOSTILE}, {"role": "user", "content": HOSTILE}],
                    max_tokens=4)  # fmt: skip
        session.snapshot(HOSTILE)
        session.fork(name=HOSTILE + "2")
    page = Page(browser, server.url)
    page.click(f'[data-session="{session.id}"]')
    page.wait(lambda: page.talk()[:2] == [HOSTILE, HOSTILE])
    assert page.nodes()[1]["title"] == HOSTILE
    assert set(page.nodes()[1]["badges"]) == {HOSTILE, HOSTILE + "2"}
    page.click("#exact")
    page.wait(lambda: len(page.talk()) == 1)  # the bundled model has no word for it
    page.click("#exact")
    page.say(HOSTILE)
    assert page.driver.execute_script("return window.struck ?? null") is None
    inner = page.driver.execute_script("return document.querySelectorAll('main img').length")
    assert inner == 0
    # And if one were put in as HTML, the policy would keep it from running.
    page.driver.execute_script(
        "const made = document.createElement('div');"
        "made.innerHTML = arguments[0]; document.body.append(made);", HOSTILE,
    )  # fmt: skip
    page.wait(lambda: any("Content Security Policy" in line for line in page.logs()))
    assert page.driver.execute_script("return window.struck ?? null") is None
    browser.refresh()  # it is as before
    page.click(f'[data-session="{session.id}"]')
    for _ in range(2):  # it asks whether that is meant
        page.click("#delete")
    page.wait(lambda: not page.all(f'[data-session="{session.id}"]'))


@pytest.mark.browser
def test_nothing_is_asked_of_other_hosts(browser: webdriver.Chrome, server: Running) -> None:
    browser.get_log("performance")
    page = Page(browser, server.url)
    page.click("#arena summary")
    page.wait(lambda: page.driver.execute_script(
        "return document.getElementById('arena-map').naturalWidth") == 1080)  # fmt: skip
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    }
    assert f"{server.url}/v1/arena.svg" in asked
    assert all(url.startswith((server.url, "blob:" + server.url)) for url in asked), asked
    assert page.logs() == []


@pytest.mark.browser
def test_the_key_is_asked_once(browser: webdriver.Chrome, started: Callable[..., Running]) -> None:
    """Fault: the key is not sent, is sent elsewhere, or a wrong one cannot be corrected."""
    running = started(Access(keys=("ann", "bob")))
    with Client(running.url, "bob") as bob:
        bob.session("of bob")
    page = Page(browser, running.url)
    for key, words in (("eve", "not one of"), ("ann", "")):
        page.wait(lambda: page.find("#key-value").is_displayed())
        page.find("#key-value").send_keys(key + Keys.ENTER)
        if words:
            page.wait(lambda: "not one of" in page.find("#key-trouble").text)
    page.wait(lambda: page.find("#model").text)
    page.find("#create-name").send_keys("of ann" + Keys.ENTER)
    page.wait(lambda: [b.text.split("\n")[0] for b in page.all("#sessions button")] == ["of ann"])
    browser.refresh()
    page.wait(lambda: page.find("#model").text)
    assert not page.find("#key-value").is_displayed()
    page.click("#forget")
    page.wait(lambda: page.find("#key-value").is_displayed())


@pytest.mark.browser
def test_the_keyboard_is_enough(browser: webdriver.Chrome, server: Running) -> None:
    """Fault: a state, or what is done with it, is reached by a pointer alone."""
    with Client(server.url) as client:
        session = client.session("keys")
        for text in (WALK, MORE):
            session.say(text, max_tokens=4)
    page = Page(browser, server.url)
    page.click(f'[data-session="{session.id}"]')
    page.wait(lambda: len(page.nodes()) == 3)
    selected: Any = page.find('.node[aria-selected="true"]')
    selected.send_keys(Keys.ARROW_UP)
    page.wait(lambda: [n["selected"] for n in page.nodes()] == [False, True, False])
    browser.switch_to.active_element.send_keys(Keys.ARROW_UP)
    page.wait(lambda: page.nodes()[0]["selected"])
    browser.switch_to.active_element.send_keys(Keys.END)
    page.wait(lambda: page.nodes()[2]["selected"])
    browser.switch_to.active_element.send_keys(Keys.ARROW_UP)
    page.find("#back").send_keys(Keys.ENTER)
    page.wait(lambda: page.nodes()[1]["here"])
    unnamed = page.driver.execute_script("""
        return [...document.querySelectorAll("button, input, textarea")]
          .filter((one) => !(one.textContent.trim() || one.ariaLabel || one.labels?.length
            || one.getAttribute("aria-labelledby"))).map((one) => one.id);""")
    assert unnamed == []


def test_files_of_the_page(server: Running) -> None:
    """Fault: a file is not served or not packaged, or names another host."""
    assert {path.name for path in FOLDER.iterdir()} == set(FILES)
    for name in FILES:
        found = server.get("/" if name == "page.html" else f"/page/{name}")
        assert found.status_code == 200
        assert found.headers["content-type"] == FILES[name]
        policy = found.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy and "http" not in policy and "*" not in policy
        assert "://" not in found.text.replace("http://www.w3.org/2000/svg", "")  # only a name
    assert server.get("/page/..%2fapp.py").status_code == 404
    assert server.get("/page/none.js").status_code == 404


@pytest.mark.browser
def test_an_image_is_said_and_shown(
    browser: webdriver.Chrome, started: Callable[..., Running], tmp_path: Path
) -> None:
    """Fault: a chosen file is not sent, is sent again with the next message, or cannot be seen."""
    running = started(checkpoint=write(tmp_path / "seeing"), images=True)
    page = Page(browser, running.url)
    page.find("#create-name").send_keys("eyes" + Keys.ENTER)
    page.wait(lambda: [n["here"] for n in page.nodes()] == [True])
    page.find("#files").send_keys(str(FILE))
    page.say("what ?")
    assert page.nodes()[1]["title"] == "[image] what ?"
    widths = "return [...document.querySelectorAll('.picture')].map((one) => one.naturalWidth);"
    page.wait(lambda: page.driver.execute_script(widths) == [Image.open(FILE).width])
    page.say("and now ?")
    assert page.nodes()[2]["title"] == "and now ?"
    assert [line for line in page.logs() if "WARNING" not in line] == []


@pytest.mark.browser
def test_who_is_where(
    browser: webdriver.Chrome, started: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: a running turn, or one that waits, is not seen; Stop leaves it in the queue."""
    running = started(lanes=1)
    device = running.engine.backend
    replay = device.replay
    monkeypatch.setattr(device, "replay", lambda *a: (time.sleep(0.005), replay(*a))[1])
    stops = {str(token): -100 for token in running.engine.checkpoint.stop_tokens}
    with Client(running.url) as client:
        session = client.session("waiter")
        page = Page(browser, running.url)
        page.click(f'[data-session="{session.id}"]')
        walker = client.session("walker")
        # Slowed as it is, the model is not through all positions before the page has looked.
        walk = walker.stream(WALK, max_tokens=1000, temperature=1.5, logit_bias=stops)
        next(walk)
        page.wait(lambda: "walker" in page.find(".lane.yours").text)
        page.find("#text").send_keys(WALK)
        page.click("#send")
        page.click("#stop")
        page.wait(lambda: not page.all(".message.live"))
        walk.close()  # type: ignore[attr-defined]
        page.wait(lambda: not page.all(".lane.busy") and page.find("#queue").text == "nobody waits")
        assert len(session.tree()["nodes"]) <= 2
        page.click(f'[data-session="{walker.id}"]')
        page.wait(lambda: len(page.nodes()) == 2)
    assert [line for line in page.logs() if "WARNING" not in line] == []
