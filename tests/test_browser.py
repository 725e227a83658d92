"""The report of a real run in a real browser: Debian's `chromium` and `chromium-driver`, driven by selenium."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from timm_rld.report import write_report

CHROMIUM = os.environ.get('CHROMIUM') or shutil.which('chromium') or ''
DRIVER = os.environ.get('CHROMEDRIVER') or shutil.which('chromedriver') or ''
FLAGS = (
    '--headless=new', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-dev-shm-usage',
    '--disable-background-networking', '--disable-component-update', '--disable-sync', '--window-size=1200,900',
)  # fmt: skip
BLOCKS = ('verdict', 'answers', 'curves', 'classes', 'calibration', 'images', 'time', 'settings')

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason='no chromium with chromedriver here: apt-get install chromium chromium-driver'
)


@pytest.fixture(scope='module')
def page(folder, tmp_path_factory) -> Path:
    """The report of a run on `folder`."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from train_distill import main

    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    root = tmp_path_factory.mktemp('runs')
    assert main([
        '--teacher', 'cifar_resnet20', '--student', 'cifar_resnet8', '--data-dir', str(folder), '--img-size', '32',
        '--no-teacher-pretrained', '--teacher-epochs', '1', '--epochs', '2', '--batch-size', '8', '--workers', '0',
        '--lr', '0.01', '--min-teacher-acc', '0', '--output', str(root), '--experiment', 'run',
    ]) == 0  # fmt: skip
    return write_report(root / 'run', log=lambda _: None)[0]


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    """Headless Chromium that records its console and all that it asks for."""
    webdriver = pytest.importorskip('selenium.webdriver', reason="selenium is missing: pip install -e '.[test]'")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f'--user-data-dir={tmp_path_factory.mktemp("profile")}'):
        options.add_argument(flag)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    yield driver
    driver.quit()


def show(browser: Any, page: Path, width: int = 1200, scheme: str = 'light') -> None:
    """Open a page at a width, as a phone does where it is narrow."""
    size = dict(width=width, height=800, deviceScaleFactor=1, mobile=width < 500)
    browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', size)
    scheme = dict(features=[dict(name='prefers-color-scheme', value=scheme)])
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', scheme)
    browser.get(page.as_uri())


def test_a_report_opens_without_an_error_and_asks_for_nothing(browser, page):
    browser.get('about:blank')
    for kind in ('browser', 'performance'):
        browser.get_log(kind)  # what the browser did by itself when it started
    show(browser, page)
    browser.execute_script('window.scrollTo(0, document.body.scrollHeight)')
    assert browser.get_log('browser') == []
    events = [json.loads(entry['message'])['message'] for entry in browser.get_log('performance')]
    asked = [e['params']['request']['url'] for e in events if e['method'] == 'Network.requestWillBeSent']
    assert page.as_uri() in asked
    assert [url for url in asked if url != page.as_uri() and not url.startswith('data:')] == []


def test_every_block_is_there_and_shows_its_plots_and_pictures(browser, page):
    show(browser, page)
    shown = browser.execute_script(
        'return [...document.querySelectorAll("main section")].map(s => [s.id, s.offsetHeight])'
    )
    assert tuple(key for key, _ in shown) == BLOCKS and min(height for _, height in shown) > 80
    drawn = browser.execute_script(
        'return [...document.querySelectorAll("svg, .picture img")].map(x => x.getBoundingClientRect().height)'
    )
    assert len(drawn) > 40 and min(drawn) > 20
    broken = 'return [...document.images].filter(i => !i.complete || !i.naturalWidth).length'
    assert browser.execute_script(broken) == 0


COLUMN = """
const column = document.querySelectorAll('#classes table')[0];
return [...column.tBodies[0].rows].map(row => row.cells[arguments[0]].textContent.trim());
"""


def test_a_click_on_a_title_sorts_the_table_and_another_turns_it_round(browser, page):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    show(browser, page)
    titles = (By.CSS_SELECTOR, '#classes table th button')
    buttons = WebDriverWait(browser, 60).until(lambda _: browser.find_elements(*titles))
    for number in (0, 1):
        for descending in (False, True):
            browser.execute_script('arguments[0].click()', buttons[number])
            values = browser.execute_script(COLUMN, number)
            assert values == sorted(values, key=str if number == 0 else float, reverse=descending)
    assert browser.get_log('browser') == []


def test_a_picture_can_be_enlarged_and_closed_again(browser, page):
    from selenium.webdriver.common.by import By

    show(browser, page)
    picture = browser.find_element(By.CSS_SELECTOR, '.picture img')
    browser.execute_script('arguments[0].scrollIntoView({block: "center", behavior: "instant"})', picture)
    size = 'return document.querySelector(".picture img").getBoundingClientRect().width'
    small = browser.execute_script(size)
    picture.click()
    assert browser.execute_script(size) > 5 * small
    browser.find_element(By.TAG_NAME, 'body').send_keys('\ue00c')  # Escape
    assert browser.execute_script(size) == small


@pytest.mark.parametrize('width', [320, 390, 768, 1200])
def test_no_width_scrolls_sideways(browser, page, width):
    show(browser, page, width)
    wide = 'return [document.documentElement.scrollWidth, document.documentElement.clientWidth]'
    scrolled, visible = browser.execute_script(wide)
    assert scrolled <= visible and visible > width - 20  # a scroll bar down the side


CONTRAST = """
const seen = [];
const number = c => c.match(/[\\d.]+/g).slice(0, 3).map(Number).map(v => v / 255)
  .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
const light = c => { const [r, g, b] = number(c); return .2126 * r + .7152 * g + .0722 * b; };
const back = light(getComputedStyle(document.body).backgroundColor);
for (const x of document.querySelectorAll('main p, main td, main th, figcaption span, svg text')) {
  const style = getComputedStyle(x), own = light(x.closest('svg') ? style.fill : style.color);
  seen.push((Math.max(own, back) + .05) / (Math.min(own, back) + .05));
}
return seen;
"""


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_text_can_be_read_in_light_and_dark(browser, page, scheme):
    show(browser, page, scheme=scheme)
    seen = browser.execute_script(CONTRAST)
    assert len(seen) > 100 and min(seen) > 4.5


def test_without_script_everything_is_shown(browser, page):
    browser.execute_cdp_cmd('Emulation.setScriptExecutionDisabled', dict(value=True))
    try:
        show(browser, page)
    finally:
        browser.execute_cdp_cmd('Emulation.setScriptExecutionDisabled', dict(value=False))
    shown = browser.execute_script(
        'return [...document.querySelectorAll("section")].filter(s => s.offsetHeight).length'
    )
    assert shown == len(BLOCKS)
    assert browser.execute_script('return document.querySelectorAll("th button").length') == 0
