"""A headless Chromium of the distribution, and what tests read off the page."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any, TypeVar

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

T = TypeVar("T")


def open_browser() -> webdriver.Chrome:
    """It and its driver are looked for on PATH, and nowhere else."""
    paths = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = [name for name, path in paths.items() if path is None]
    assert not missing, f"no {' and no '.join(missing)}: apt-get install chromium chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = paths["chromium"] or ""
    for option in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1440,1000"):
        options.add_argument(f"--{option}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options, webdriver.ChromeService(paths["chromedriver"]))


class Page:
    """The page of a server in a browser."""

    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        self.driver = driver
        self.logs()  # of pages before this one
        driver.get(url)

    def find(self, css: str) -> WebElement:
        return self.wait(lambda: self.driver.find_element(By.CSS_SELECTOR, css))

    def all(self, css: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def wait(self, what: Callable[[], T], seconds: float = 20) -> T:
        """What is true in the end; elements may be replaced meanwhile."""
        lost = (StaleElementReferenceException,)
        return WebDriverWait(self.driver, seconds, 0.05, lost).until(lambda _: what())

    def click(self, css: str) -> None:
        def clicked() -> bool:
            element = self.driver.find_element(By.CSS_SELECTOR, css)
            is_ready = element.is_displayed() and element.is_enabled()
            if is_ready:
                element.click()
            return is_ready

        self.wait(clicked)

    def say(self, text: str) -> None:
        """Say it, and wait for the reply's end, and until the tree has its title."""
        before = len(self.nodes())
        self.find("#text").send_keys(text)
        self.click("#send")
        self.wait(lambda: len(self.nodes()) == before + 1 and not self.all(".message.live"))
        self.wait(lambda: all(node["title"] != "…" for node in self.nodes()))

    def nodes(self) -> list[dict[str, Any]]:
        """Rows of the tree, as they are drawn."""
        script = """
            return [...document.querySelectorAll("#tree .node")].map((row) => ({
              id: row.dataset.node, level: Number(row.ariaLevel),
              title: row.querySelector(".title").textContent,
              badges: [...row.querySelectorAll(".badge")].map((one) => one.textContent),
              here: row.querySelector(".badge.here") !== null,
              selected: row.ariaSelected === "true",
            }));"""
        found: list[dict[str, Any]] = self.driver.execute_script(script)
        return found

    def talk(self) -> list[str]:
        script = (
            "return [...document.querySelectorAll('#talk .said')].map((one) => one.textContent)"
        )
        found: list[str] = self.driver.execute_script(script)
        return found

    def logs(self) -> list[str]:
        """What went wrong since it was asked last: errors of scripts, and what CSP forbade."""
        found = self.driver.get_log("browser")
        return [entry["message"] for entry in found if entry["level"] in ("SEVERE", "WARNING")]
