"""The page in a real browser, without a window."""

import shutil
import time

import pytest
from report_examples import NASTY, make_batch, make_post_processor, run_test, two_products

pytestmark = pytest.mark.slow

#: GitHub's machines have Chrome, whose driver would not fit their Chromium.
CHROMIUM = next(filter(None, map(shutil.which, ("google-chrome", "chromium", "chromium-browser"))), None)
DRIVER = shutil.which("chromedriver")
ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip

#: Contrast of each text with what is behind it, for the smallest of which WCAG asks 4.5.
CONTRASTS = """
const channels = (text) => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
const brightness = (c) => c.slice(0, 3).map((v) => v / 255)
  .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = (element) => {
  for (let one = element; one; one = one.parentElement) {
    const colour = channels(getComputedStyle(one).backgroundColor);
    if (colour.length < 4 || colour[3] > 0) return colour;
  }
  return [255, 255, 255];
};
const rows = [];
const selector = "h1, h2, h3, p, a, th button, td, dt, dd, select, .button, output, .badge, .score, .type, code, "
  + "figcaption, svg text";
for (const element of document.querySelectorAll(selector)) {
  const isDrawn = element.closest("svg");
  const style = getComputedStyle(element);
  const text = brightness(channels(isDrawn ? style.fill : style.color));
  const back = brightness(behind(isDrawn ? isDrawn.parentElement : element));
  rows.push([(Math.max(text, back) + 0.05) / (Math.min(text, back) + 0.05), element.outerHTML.slice(0, 80)]);
}
return rows;
"""


@pytest.fixture(scope="module")
def driver():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if not CHROMIUM or not DRIVER:
        pytest.skip("neither chromium nor chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ARGUMENTS:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def show(driver):
    def open_page(path, width=1280, height=900, scheme="light"):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
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


def names(driver):
    """The products of the table of metrics, from above."""
    rows = "return [...document.querySelectorAll('table.sortable')[0].tBodies[0].rows].map(r => r.cells[0].innerText)"
    return driver.execute_script(rows)


def shown(driver):
    """Product and decision of the cards that can be seen."""
    cards = "return [...document.querySelectorAll('.card')].filter(c => c.checkVisibility())"
    cards += ".map(c => [c.dataset.product, c.dataset.verdict])"
    return [tuple(card) for card in driver.execute_script(cards)]


def choose(driver, name, text):
    from selenium.webdriver.support.ui import Select

    Select(driver.find_element("name", name)).select_by_visible_text(text)
    return driver.find_element("css selector", "output").text


def test_filters(show, page):
    driver = show(page)
    assert len(shown(driver)) == 10
    assert choose(driver, "product", "bolts") == "6 of 10 images"
    assert {product for product, _ in shown(driver)} == {"0"}
    assert choose(driver, "verdict", "Wrong") == "2 of 10 images"
    assert [verdict for _, verdict in shown(driver)] == ["alarm", "missed"]
    assert choose(driver, "verdict", "Missed defects") == "1 of 10 images"
    assert choose(driver, "type", "good") == "0 of 10 images"
    assert driver.find_element("id", "nothing").is_displayed()
    assert not driver.find_element("id", "images-0").is_displayed()
    driver.find_element("css selector", "#nothing button").click()
    time.sleep(0.1)
    assert len(shown(driver)) == 10
    assert driver.find_element("css selector", "output").text == "10 of 10 images"


def test_sorting_by_mouse_and_keyboard(show, page):
    from selenium.webdriver.common.keys import Keys

    driver = show(page)
    assert names(driver) == ["bolts", "cloth"]
    headings = driver.find_elements("css selector", "table.sortable")[0].find_elements("css selector", "thead th")
    headings[1].find_element("tag name", "button").click()
    assert names(driver) == ["cloth", "bolts"]
    assert [heading.get_attribute("aria-sort") for heading in headings[:3]] == [None, "descending", None]
    headings[1].find_element("tag name", "button").send_keys(Keys.ENTER)
    assert names(driver) == ["bolts", "cloth"]
    assert headings[1].get_attribute("aria-sort") == "ascending"
    headings[0].find_element("tag name", "button").send_keys(Keys.SPACE)
    assert names(driver) == ["bolts", "cloth"]
    assert headings[0].get_attribute("aria-sort") == "ascending"


def test_what_is_missing_is_sorted_last(show, tmp_path):
    batches = [
        make_batch([0.1, 0.6], [False, True], "b"),
        make_batch([0.1], [False], "a"),
        make_batch([0.9, 0.2], [False, True], "c"),
    ]
    driver = show(run_test(tmp_path, batches, post_processor=make_post_processor()))
    button = driver.find_elements("css selector", "table.sortable thead button")[1]
    for expected in (["b", "c", "a"], ["c", "b", "a"]):
        button.click()
        assert names(driver) == expected


def test_the_keyboard_reaches_everything(show, page):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    driver = show(page)
    ActionChains(driver).send_keys(Keys.TAB).perform()
    skip = driver.switch_to.active_element
    assert skip.text == "Skip to the results"
    assert skip.rect["y"] >= 0
    outline = driver.execute_script("return getComputedStyle(arguments[0]).outlineWidth", skip)
    assert float(outline.removesuffix("px")) >= 2
    skip.send_keys(Keys.ENTER)
    assert driver.switch_to.active_element.get_attribute("id") == "main"
    zoom = driver.find_element("css selector", ".zoom")
    zoom.send_keys(Keys.ENTER)
    dialog = driver.find_element("id", "large")
    assert dialog.is_displayed()
    assert len(dialog.find_elements("css selector", ".panes svg")) == 3
    ActionChains(driver).send_keys(Keys.ESCAPE).perform()
    assert not dialog.is_displayed()
    assert driver.switch_to.active_element == zoom


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read(scheme, show, page):
    driver = show(page, scheme=scheme)
    back = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (int(back.removeprefix("rgb(").partition(",")[0]) < 60) == (scheme == "dark")
    rows = driver.execute_script(CONTRASTS)
    assert len(rows) > 100
    assert [row for row in rows if row[0] < 4.5] == []


@pytest.mark.parametrize("width", [320, 390, 800, 1280])
def test_nothing_sticks_out(width, show, page):
    driver = show(page, width, 800)
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    charts = driver.execute_script(
        "return [...document.querySelectorAll('.chart, .card')].map(c => c.getBoundingClientRect().right)"
    )
    assert max(charts) <= width


def test_every_picture_is_drawn(show, page):
    driver = show(page)
    decode = (
        "const done = arguments[0]; const images = [...document.querySelectorAll('image')];"
        "Promise.all(images.map(i => i.decode())).then(() => done(images.length), error => done(String(error)))"
    )
    assert driver.execute_async_script(decode) == 20
    roles = driver.execute_script(
        "return [...document.querySelectorAll('svg:not([aria-hidden])')].filter(s => s.getAttribute('role') !== 'img' "
        "|| !(s.getAttribute('aria-label') || s.querySelector('title'))).length"
    )
    assert roles == 0
    duplicates = (
        "const ids = [...document.querySelectorAll('[id]')].map(e => e.id); return ids.length - new Set(ids).size"
    )
    assert driver.execute_script(duplicates) == 0


def test_names_run_nothing(show, tmp_path):
    batches = [
        make_batch([0.1, 0.9], [False, True], name, [f"/d/{number}/{name.replace('/', '_')}/{i}.png" for i in range(2)])
        for number, name in enumerate(NASTY)
    ]  # fmt: skip
    driver = show(run_test(tmp_path, batches, post_processor=make_post_processor()))
    assert driver.execute_script("return window.hacked") is None
    assert sorted(names(driver)) == sorted(NASTY)
    assert choose(driver, "product", NASTY[2]) == f"2 of {2 * len(NASTY)} images"


def test_it_is_whole_without_scripts(show, driver, page):
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        driver = show(page)
        assert len([card for card in driver.find_elements("css selector", ".card") if card.is_displayed()]) == 10
    finally:
        driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
