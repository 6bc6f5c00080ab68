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
    def open_page(path, width=1280):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
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


@pytest.mark.parametrize("width", [320, 800, 1280])
def test_nothing_sticks_out(width, show, page):
    assert show(page, width).execute_script("return document.documentElement.scrollWidth") <= width
