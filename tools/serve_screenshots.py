"""Takes the pictures of the page of `flashrt serve`, from a real run of the bundled model.

IS: docs/pictures/serve-*.png by a headless Chromium, in few colours. IS NOT: the page
(flashrt/serve/page). Run it when the page changes; it needs selenium, pillow, chromium and
chromedriver.

    python tools/serve_screenshots.py [--out docs/pictures]
"""

from __future__ import annotations

import argparse
import base64
import io
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By

import flashrt
from flashrt.client import Client, Session
from flashrt.serve.access import Access
from flashrt.serve.run import Server
from flashrt.weights.bundled import bundled_checkpoint
from flashrt.worlds.document import HELD_OUT
from flashrt.worlds.inventory import Inventory

WIDTH, HEIGHT = 1440, 1010
POSITIONS, LANES = 2048, 4


@contextmanager
def serving() -> Iterator[tuple[str, frozenset[int]]]:
    """A server: its address, and the tokens that end a reply."""
    with flashrt.load(bundled_checkpoint(), "cpu", POSITIONS, LANES, pool_bytes=64 << 20) as engine:
        server = Server(engine, "tiny-agent", Access(), port=0)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            yield server.url, frozenset(engine.checkpoint.stop_tokens)
        finally:
            server.end()
            thread.join()
            server.close()


@contextmanager
def browsing() -> Iterator[webdriver.Chrome]:
    """A headless Chromium of the distribution."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for option in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
    ):
        options.add_argument(option)
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options, service)
    try:
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False,
        })  # fmt: skip
        yield driver
    finally:
        driver.quit()


def converse(client: Client) -> Session:
    """Sessions that branch."""
    world = Inventory(HELD_OUT, 60, 12)
    options = {"max_tokens": 24, "temperature": 0}
    session = client.session("inventory")
    ask = [world.question(thing) for thing in world.things]
    session.say([
        {"role": "system", "content": world.prompt()}, {"role": "user", "content": ask[30]},
    ], **options)  # fmt: skip
    session.snapshot("briefed")
    for text in ask[3:5]:
        session.say(text, **options)
    other = session.fork("briefed", name="second opinion")
    for text in ask[11:14]:
        other.say(text, **options)
    session.say(ask[17], **options)
    session.rollback(2)
    session.say(ask[22], **options)
    third = other.fork(name="what if")
    third.say(ask[41], **options)
    other.say(ask[44], **options)
    session.say(ask[48], **options)
    walk = client.session("a walk")
    walk.say("start in column six row six . west east south south where am i ?", **options)
    return session


@contextmanager
def busy(client: Client, stops: frozenset[int]) -> Iterator[None]:
    """Somebody walks on and on meanwhile."""
    walk = next(session for session in client.sessions() if session.name == "a walk")
    bias = {str(token): -100 for token in stops}
    text = "start in column one row two . east where am i ?"
    stream = walk.stream(text, max_tokens=1900, temperature=0, logit_bias=bias)
    is_over = threading.Event()

    def listen() -> None:
        for _ in stream:
            if is_over.is_set():
                break
        stream.close()  # type: ignore[attr-defined]

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def picture(driver: webdriver.Chrome, scheme: str) -> Image.Image:
    """The page as it is now."""
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    time.sleep(1.5)  # the page looks again once a second
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
    data = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
    return data.quantize(128, dither=Image.Dither.NONE)


def main() -> None:
    """Parse arguments, take them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"), help="folder")
    out: Path = parser.parse_args().out
    shots = {}
    with serving() as (url, stops), Client(url) as client, browsing() as driver:
        session = converse(client)
        driver.implicitly_wait(10)
        driver.get(url)
        driver.find_element(By.CSS_SELECTOR, f'[data-session="{session.id}"]').click()
        tip = session.tree()["session"]["tip"]
        driver.find_element(By.CSS_SELECTOR, f'[data-node="{tip}"]').click()
        driver.find_element(By.ID, "turns").find_element(By.TAG_NAME, "tr")
        for scheme in ("light", "dark"):
            with busy(client, stops):
                shots[f"serve-{scheme}"] = picture(driver, scheme)
    for name, image in shots.items():
        path = out / f"{name}.png"
        image.save(path, optimize=True)
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
