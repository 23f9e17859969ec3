"""The report in a browser: nothing goes wrong, everything is drawn, on a desk and on a phone.

`make browser` runs it. Screenshots go to docs/images.
"""

from __future__ import annotations

import base64
import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from demo import RECIPE, moe
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--hide-scrollbars", "--force-color-profile=srgb")  # fmt: skip

SCREENS = {"desktop": (1440, 900), "phone": (390, 844)}
COLOURS = ("light", "dark")
REPORTS = ("llama", "moe")


@pytest.fixture(scope="session")
def pages(tmp_path_factory):
    """Reports of the llama and of the MoE, both in several schemes."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "moe.toml").write_text(RECIPE)
    made = {}
    for name, src, recipe in (
        ("llama", ROOT / "examples" / "bytes-llama", ROOT / "recipes" / "int4-int8-down.toml"),
        ("moe", moe(folder / "moe-8x24"), folder / "moe.toml"),
    ):
        (folder / name).mkdir()
        (folder / name / src.name).symlink_to(src)
        dst = folder / name / f"{src.name}-mixed"
        run = [Path(sys.executable).parent / "streamq"]
        subprocess.run([*run, "convert", src, dst, "--recipe", recipe, "-q"], check=True)
        made[name] = folder / name / "report.html"
        subprocess.run(
            [*run, "report", dst.name, "--source", src.name, "-o", "report.html", "-q"],
            check=True, cwd=folder / name,
        )  # fmt: skip
    return made


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Chromium with an empty profile."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options, service)
    yield driver
    driver.quit()


@pytest.fixture
def look(browser, pages):
    """Opens a report on a screen, in colours, and waits until it is drawn."""

    def look(name, screen, colours):
        width, height = SCREENS[screen]
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": height, "deviceScaleFactor": 1,
            "mobile": screen == "phone"})  # fmt: skip
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {
            "features": [{"name": "prefers-color-scheme", "value": colours}]})  # fmt: skip
        browser.get(pages[name].as_uri())
        ready(browser)
        return browser

    return look


def ready(browser):
    WebDriverWait(browser, 20).until(
        lambda b: b.execute_script("return document.body.dataset.ready") == "yes"
    )


def errors(browser):
    return [e for e in browser.get_log("browser") if e["level"] in ("SEVERE", "WARNING")]


def shot(browser, name, width, height):
    """A picture of the top of the page, of few enough colours to be small."""
    taken = browser.execute_cdp_cmd("Page.captureScreenshot", {
        "format": "png", "captureBeyondViewport": True,
        "clip": {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}})  # fmt: skip
    IMAGES.mkdir(exist_ok=True)
    image = Image.open(io.BytesIO(base64.b64decode(taken["data"]))).convert("RGB")
    path = IMAGES / f"report-{name}.png"
    image.quantize(192, dither=Image.Dither.NONE).save(path, optimize=True)
    assert path.stat().st_size < 300_000
    return path


@pytest.mark.parametrize("colours", COLOURS)
@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("name", REPORTS)
def test_every_chart_is_drawn(look, name, screen, colours):
    page = look(name, screen, colours)
    assert errors(page) == []
    width, _ = SCREENS[screen]
    charts = page.find_elements(By.CSS_SELECTOR, ".chart")
    assert len(charts) >= 5 + 12
    for chart in charts:
        marks = chart.find_elements(By.CSS_SELECTOR, "svg .role-mark path")
        assert len(marks) >= 1, chart.get_attribute("id")
        box = chart.find_element(By.TAG_NAME, "svg").rect
        assert box["width"] > 100
        assert box["height"] > 60
        assert box["x"] + box["width"] <= width
    map_ = page.find_elements(By.CSS_SELECTOR, "#map svg .mark-rect.role-mark path")
    assert len(map_) == {"llama": 3 * 7 + 2, "moe": 24 * 8 + 2}[name]
    # Nothing is wider than the screen.
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    shade = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, shade[4:-1].split(","))) < 200) == (colours == "dark")
    height = 2000 if screen == "phone" else 1750
    shot(page, f"{name}-{screen}-{colours}", width, height)


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("name", REPORTS)
def test_labels_of_an_axis_do_not_overlap(look, name, screen):
    page = look(name, screen, "light")
    script = """
      const found = [], across = (r, s) => r.left < s.right - 1 && s.left < r.right - 1;
      const above = (r, s) => r.top < s.bottom - 2 && s.top < r.bottom - 2;
      for (const chart of document.querySelectorAll('.chart')) {
        const boxes = [...chart.querySelectorAll('svg .role-axis-label text, .role-legend text')]
          .filter((t) => t.textContent && t.getAttribute('opacity') !== '0')
          .map((t) => [t.textContent, t.getBoundingClientRect()]);
        boxes.forEach(([a, r], i) => boxes.slice(0, i).forEach(([b, s]) => {
          if (across(r, s) && above(r, s)) found.push(`${a} over ${b} in ${chart.id}`);
        }));
      }
      return found;"""
    assert page.execute_script(script) == []


@pytest.mark.parametrize(
    "metric", ["sqnr_db", "against_db", "max_error", "max_error_rms", "clipped"]
)
def test_the_other_losses(look, metric):
    page = look("moe", "desktop", "light")
    tab = page.find_element(By.CSS_SELECTOR, f'#metrics [data-name="{metric}"]')
    tab.click()
    WebDriverWait(page, 5).until(lambda _: tab.get_attribute("aria-selected") == "true")
    title = tab.text.split(" (")[0]
    WebDriverWait(page, 5).until(
        lambda b: title in b.find_element(By.CSS_SELECTOR, "#heat svg").get_attribute("innerHTML")
    )
    cells = page.find_elements(By.CSS_SELECTOR, "#heat svg .mark-rect.role-mark path")
    assert len(cells) == 24 * 7
    assert errors(page) == []


def column(page, i):
    cells = page.find_elements(By.CSS_SELECTOR, f"#tensors tbody td:nth-child({i + 1})")
    return [c.text for c in cells]


@pytest.mark.parametrize("screen", SCREENS)
def test_the_table_sorts_filters_and_turns_pages(look, screen):
    page = look("moe", screen, "light")
    heads = page.find_elements(By.CSS_SELECTOR, "#tensors th")
    names = [h.text.rstrip(" ▲▼") for h in heads]
    sqnr = names.index("SQNR (dB)")
    assert heads[sqnr].get_attribute("aria-sort") == "ascending"
    shown = [float(x) for x in column(page, sqnr)]
    assert shown == sorted(shown)
    assert len(shown) == {"desktop": 50, "phone": 20}[screen]

    def click(i):
        page.execute_script("arguments[0].click()", heads[i])

    click(sqnr)
    assert heads[sqnr].get_attribute("aria-sort") == "descending"
    again = [float(x) for x in column(page, sqnr)]
    assert again == sorted(again, reverse=True)
    assert again[0] > shown[0]
    click(0)
    first = column(page, 0)
    assert first[0] == "lm_head.weight"
    assert "model.layers.0.mlp.experts.0.up_proj.weight" in first
    page.execute_script("document.getElementById('next').click()")
    assert column(page, 0)[0] not in first
    page.find_element(By.ID, "filter").send_keys("layers.23.mlp.experts.7")
    assert len(column(page, 0)) == 3
    assert page.find_element(By.ID, "page").text == "1 to 3 of 3"
    assert errors(page) == []


def test_a_cell_says_what_it_is(look):
    page = look("moe", "desktop", "dark")
    cell = page.find_elements(By.CSS_SELECTOR, "#map svg .mark-rect.role-mark path")[5]
    webdriver.ActionChains(page).move_to_element(cell).perform()
    tip = page.find_element(By.ID, "vg-tooltip-element")
    WebDriverWait(page, 5).until(lambda _: "scheme" in tip.text)
    assert "lowest SQNR" in tip.text


def test_colours_by_hand(look):
    page = look("llama", "desktop", "dark")
    seen = []
    for _ in range(3):
        page.find_element(By.ID, "theme").click()
        ready(page)
        seen.append(page.find_element(By.TAG_NAME, "html").get_attribute("data-theme"))
    assert seen == ["light", "dark", "dark"]


def test_names_do_no_harm(browser, tmp_path):
    """A script in the name of a tensor stays text, and nobody is asked for anything."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    evil = "</script><script>window.harm = 1</script><img src=x onerror='window.harm = 2'>"
    src = tmp_path / "src"
    src.mkdir()
    weight = np.linspace(-1, 1, 64 * 128).reshape(64, 128).astype(ml_dtypes.bfloat16)
    save_file({f"model.layers.{n}.{evil}.weight": weight for n in (0, 1)},
              src / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    run = [Path(sys.executable).parent / "streamq"]
    how = ["-s", "w4a16", "--report", tmp_path / "r.html", "-q"]
    subprocess.run([*run, "convert", src, tmp_path / "dst", *how], check=True)
    browser.get((tmp_path / "r.html").as_uri())
    ready(browser)
    assert browser.execute_script("return window.harm") is None
    assert evil in browser.find_element(By.CSS_SELECTOR, "#tensors td").text
    tips = browser.find_elements(By.CSS_SELECTOR, "#map svg .mark-rect.role-mark path")
    webdriver.ActionChains(browser).move_to_element(tips[0]).perform()
    assert browser.execute_script("return window.harm") is None
    asked = browser.execute_script("return performance.getEntriesByType('resource').length")
    assert asked == 0
    assert errors(browser) == []
