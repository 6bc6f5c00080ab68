"""The page in a real browser, without a window."""

import shutil
import time

import pytest
from report_examples import two_products

pytestmark = pytest.mark.slow

#: GitHub's machines have Chrome, whose driver would not fit their Chromium.
CHROMIUM = next(filter(None, map(shutil.which, ("google-chrome", "chromium", "chromium-browser"))), None)
DRIVER = shutil.which("chromedriver")
ARGUMENTS = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-background-networking"

#: Contrast of each text with what is behind it, for the smallest of which WCAG asks 4.5.
CONTRASTS = """
const channels = (text) => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
const brightness = (c) => c.slice(0, 3).map((v) => v / 255)
  .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = (element) => {
  const colour = channels(getComputedStyle(element).backgroundColor);
  return colour.length < 4 || colour[3] > 0 || !element.parentElement ? colour : behind(element.parentElement);
};
const selector = "h1, h2, h3, p, a, th, td, dt, dd, select, button, output, .badge, header span, b, code, figcaption";
return [...document.querySelectorAll(selector)].map((element) => {
  const style = getComputedStyle(element);
  const text = brightness(channels(style.color));
  const back = brightness(behind(element));
  return [(Math.max(text, back) + 0.05) / (Math.min(text, back) + 0.05), element.outerHTML.slice(0, 80)];
});
"""


@pytest.fixture(scope="module")
def driver():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if not CHROMIUM or not DRIVER:
        pytest.skip("neither chromium nor chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ARGUMENTS.split():
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER)) as driver:
        yield driver


@pytest.fixture
def show(driver):
    def open_page(path, width=1280, scheme="light"):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        driver.get(path.as_uri())
        return driver

    yield open_page
    assert [row["message"] for row in driver.get_log("browser") if row["level"] in ("SEVERE", "WARNING")] == []


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return two_products(tmp_path_factory.mktemp("page"))


def shown(driver):
    """The decisions of the cards that can be seen."""
    cards = driver.find_elements("css selector", ".card")
    return [card.get_attribute("data-verdict") for card in cards if card.is_displayed()]


def choose(driver, name, text):
    from selenium.webdriver.support.ui import Select

    Select(driver.find_element("name", name)).select_by_visible_text(text)
    return driver.find_element("css selector", "output").text


def test_filters(show, page):
    driver = show(page)
    assert len(shown(driver)) == 10
    assert choose(driver, "product", "bolts") == "6 of 10 images"
    assert choose(driver, "verdict", "Wrong") == "2 of 10 images"
    assert shown(driver) == ["alarm", "missed"]
    assert choose(driver, "verdict", "Missed defects") == "1 of 10 images"
    assert choose(driver, "type", "good") == "0 of 10 images"
    assert not driver.find_element("id", "images-0").is_displayed()
    driver.find_element("css selector", "form button").click()
    time.sleep(0.1)
    assert len(shown(driver)) == 10


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read(scheme, show, page):
    driver = show(page, scheme=scheme)
    back = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (int(back.removeprefix("rgb(").partition(",")[0]) < 60) == (scheme == "dark")
    rows = driver.execute_script(CONTRASTS)
    assert len(rows) > 100
    assert [row for row in rows if row[0] < 4.5] == []


@pytest.mark.parametrize("width", [320, 800, 1280])
def test_nothing_sticks_out(width, show, page):
    assert show(page, width).execute_script("return document.documentElement.scrollWidth") <= width
