"""The built site in headless Chromium: `make docs-browser`, or python -m pytest tests/programs/site_in_browser.py.

Needs build/docs, selenium, and Chromium with its driver (apt-get install chromium chromium-driver).
"""

from __future__ import annotations

import shutil
import threading
from base64 import b64decode
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

SITE = Path(__file__).parents[2] / "build" / "docs"
PAGES = sorted(str(page.relative_to(SITE)) for page in SITE.rglob("*.html"))
WITH_FIGURES = [page for page in PAGES if "<img " in (SITE / page).read_text()]
DESKTOP = 1280
PHONE = 390
"""px"""
SECONDS = 20
"""How long a page may take to load and to find."""


class Quiet(SimpleHTTPRequestHandler):
    """Says nothing about each request."""

    def log_message(self, format: str, *args: Any) -> None:
        """Called for each request."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    assert PAGES, f"{SITE} has no pages: make docs"
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def chromium() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = shutil.which("chromedriver")
    assert driver, "chromedriver is missing: apt-get install chromium chromium-driver"
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as browser:
        browser.set_page_load_timeout(SECONDS)
        yield browser


@pytest.fixture(autouse=True)
def plain(chromium: webdriver.Chrome) -> None:
    """Each test begins with a light page of a desktop."""
    show(chromium, DESKTOP, "light")


def show(browser: webdriver.Chrome, width: int, scheme: str) -> None:
    """width: px. scheme: light or dark, as the system has it."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def brightness(browser: webdriver.Chrome, element: Any) -> float:
    """Of a picture of the element, 0 .. 1: the median, which is that of its paper."""
    place = browser.execute_script(
        "const box = arguments[0].getBoundingClientRect();"
        "return {x: box.x + scrollX, y: box.y + scrollY, width: box.width, height: box.height, scale: 1}",
        element,
    )
    # The driver's own pictures of an element take seconds where the page is long.
    picture = browser.execute_cdp_cmd("Page.captureScreenshot", {"clip": place, "captureBeyondViewport": True})
    pixels = Image.open(BytesIO(b64decode(picture["data"]))).convert("L")
    return float(np.median(np.asarray(pixels))) / 255


def click(browser: webdriver.Chrome, element: Any) -> None:
    """Click where a reader sees it: in the middle of the window, at once and not by smooth scrolling."""
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
    element.click()


def load_figures(browser: webdriver.Chrome) -> list[Any]:
    """The figures of the page, when all of them are there."""
    browser.execute_script("for (const image of document.querySelectorAll('article img')) image.loading = 'eager'")
    figures = browser.find_elements(By.CSS_SELECTOR, "article img")
    for figure in figures:
        WebDriverWait(browser, SECONDS).until(lambda _, figure=figure: figure.get_property("complete"))
    return figures


@pytest.mark.parametrize("page", PAGES)
def test_loads(chromium: webdriver.Chrome, address: str, page: str) -> None:
    chromium.get_log("browser")
    chromium.get(f"{address}/{page}")
    problems = [entry for entry in chromium.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert not problems
    for image in load_figures(chromium):
        assert image.get_property("naturalWidth") > 0, image.get_attribute("src")


@pytest.mark.parametrize("page", PAGES)
def test_fits_a_phone(chromium: webdriver.Chrome, address: str, page: str) -> None:
    show(chromium, PHONE, "light")
    chromium.get(f"{address}/{page}")
    assert chromium.execute_script("return document.documentElement.scrollWidth") <= PHONE


def test_navigation(chromium: webdriver.Chrome, address: str) -> None:
    chromium.get(f"{address}/index.html")
    names = [link.text for link in chromium.find_elements(By.CSS_SELECTOR, ".sidebar-tree a.reference") if link.text]
    assert len(names) > 15
    for name in names:
        chromium.get(f"{address}/index.html")
        click(chromium, chromium.find_element(By.LINK_TEXT, name))
        assert chromium.find_element(By.TAG_NAME, "h1").text.rstrip("¶#") == name
        assert chromium.find_element(By.CSS_SELECTOR, ".sidebar-tree .current-page > a").text == name
    chromium.get(f"{address}/install.html")
    click(chromium, chromium.find_element(By.CSS_SELECTOR, ".related-pages .next-page"))
    assert chromium.current_url.endswith("/tutorial.html")


def test_navigation_on_a_phone(chromium: webdriver.Chrome, address: str) -> None:
    show(chromium, PHONE, "light")
    chromium.get(f"{address}/index.html")
    link = chromium.find_element(By.CSS_SELECTOR, ".sidebar-tree a[href='gating.html']")
    chromium.find_element(By.CSS_SELECTOR, ".mobile-header label[for='__navigation']").click()
    WebDriverWait(chromium, SECONDS).until(lambda _: link.rect["x"] >= 0)
    click(chromium, link)
    assert chromium.find_element(By.TAG_NAME, "h1").text.rstrip("¶#") == "The gate"


@pytest.mark.parametrize(
    ("words", "target"),
    [("reduce_gradients", "api/nn.html"), ("oversubscribe", "mpi.html"), ("expert_capacity", "api/moecomm.html")],
)
def test_search(chromium: webdriver.Chrome, address: str, words: str, target: str) -> None:
    chromium.get(f"{address}/index.html")
    box = chromium.find_element(By.CSS_SELECTOR, "input.sidebar-search")
    box.send_keys(words, Keys.ENTER)

    def links(browser: webdriver.Chrome) -> list[Any]:
        found = browser.find_elements(By.CSS_SELECTOR, "#search-results li a")
        return [link for link in found if target in (link.get_attribute("href") or "")]

    link = WebDriverWait(chromium, SECONDS).until(links)[0]
    click(chromium, link)
    assert target in chromium.current_url
    assert words in chromium.find_element(By.TAG_NAME, "article").text


@pytest.mark.parametrize("page", WITH_FIGURES)
@pytest.mark.parametrize("chosen", ["by the system", "by the reader"])
def test_figures_follow_a_dark_page(chromium: webdriver.Chrome, address: str, page: str, chosen: str) -> None:
    """The reader's choice goes before the system's."""
    for theme in ("dark", "light"):
        other = "light" if theme == "dark" else "dark"
        show(chromium, DESKTOP, theme if chosen == "by the system" else other)
        chromium.get(f"{address}/{page}")
        choice = "auto" if chosen == "by the system" else theme
        chromium.execute_script("localStorage.setItem('theme', arguments[0])", choice)
        chromium.refresh()
        for figure in load_figures(chromium):
            value = brightness(chromium, figure)
            assert value < 0.3 if theme == "dark" else value > 0.9, (figure.get_attribute("src"), theme, value)
    chromium.execute_script("localStorage.clear()")
