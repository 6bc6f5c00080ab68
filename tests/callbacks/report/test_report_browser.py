"""The page in a real browser, without a window."""

import shutil
import time

import pytest
from report_examples import make_batch, make_post_processor, run_test, two_products

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
const selector = "h1, h2, h3, p, a, th button, td, dt, dd, select, .button, output, .badge, .score, .type, code, "
  + "figcaption, svg text";
return [...document.querySelectorAll(selector)].map((element) => {
  const style = getComputedStyle(element);
  const text = brightness(channels(element.closest("svg") ? style.fill : style.color));
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
    driver.find_element("css selector", "#nothing button").click()
    time.sleep(0.1)
    assert len(shown(driver)) == 10


def test_sorting_puts_what_is_missing_last(show, tmp_path):
    kinds = {"b": [False, True], "a": [False, False], "c": [True, False]}
    batches = [make_batch([0.1, 0.6], labels, name) for name, labels in kinds.items()]
    driver = show(run_test(tmp_path, batches, post_processor=make_post_processor(), evaluator=False))
    headings = driver.find_elements("css selector", "thead th")
    for column, key, order, expected in (
        (4, " ", "descending", "cba"), (4, "\n", "ascending", "bca"), (0, "\n", "ascending", "abc"),
    ):  # fmt: skip
        headings[column].find_element("tag name", "button").send_keys(key)
        assert "".join(row.text for row in driver.find_elements("css selector", "tbody th")) == expected
        assert headings[column].get_attribute("aria-sort") == order


def test_the_keyboard_reaches_everything(show, page):
    from selenium.webdriver import ActionChains, Keys

    driver = show(page)
    ActionChains(driver).send_keys(Keys.TAB).send_keys(Keys.ENTER).perform()
    assert driver.switch_to.active_element.get_attribute("id") == "main"
    zoom = driver.find_element("css selector", ".zoom")
    zoom.send_keys(Keys.ENTER)
    dialog = driver.find_element("id", "large")
    assert len([svg for svg in dialog.find_elements("css selector", ".panes svg") if svg.is_displayed()]) == 3
    ActionChains(driver).send_keys(Keys.ESCAPE).perform()
    assert not dialog.is_displayed()
    assert driver.switch_to.active_element == zoom


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read(scheme, show, page):
    driver = show(page, scheme=scheme)
    back = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (int(back.removeprefix("rgb(").partition(",")[0]) < 60) == (scheme == "dark")
    rows = driver.execute_script(CONTRASTS)
    assert any("<text" in text for _, text in rows)
    assert [row for row in rows if row[0] < 4.5] == []


@pytest.mark.parametrize("width", [320, 500, 800, 1280])
def test_nothing_sticks_out_and_a_wide_table_says_that_it_scrolls(width, show, page):
    driver = show(page, width)
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    for box, hint in zip(*(driver.find_elements("css selector", name) for name in (".scroll", ".hint")), strict=True):
        is_wide = driver.execute_script("return arguments[0].scrollWidth > arguments[0].clientWidth", box)
        assert hint.is_displayed() == is_wide
        assert is_wide or width > 500
