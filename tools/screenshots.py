"""Takes the screenshots of docs/images from the real pages, with headless Chromium.

    python tools/screenshots.py

starts a server and four virtual devices in this process, opens the query page, runs a query of the library and writes
docs/images/query-page.png. Needs chromium and chromedriver, and the built page (`make page`).
"""

import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tinyfleet.edge import tasks
from tinyfleet.edge.device.device import virtual_device
from tinyfleet.server.fleet_server import FleetServer

IMAGES = Path(__file__).parents[1] / "docs" / "images"
MAX_BYTES = 300_000
QUERY = "devices"


def browser() -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1280,820"):
        options.add_argument(argument)
    options.binary_location = shutil.which("chromium") or ""
    return webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))


def query_page(driver: webdriver.Chrome, server: FleetServer) -> Path:
    """The query page with the result of a library query: one row for each device."""
    driver.get(f"{server.address}/")
    wait = WebDriverWait(driver, 30)
    items = wait.until(lambda d: d.find_elements(By.CSS_SELECTOR, "#library li"))
    chosen = next(item for item in items if item.find_element(By.TAG_NAME, "strong").text == QUERY)
    chosen.find_element(By.TAG_NAME, "button").click()
    wait.until(lambda d: d.find_element(By.CSS_SELECTOR, ".tabPanel.active .yasqe_queryButton")).click()
    wait.until(lambda d: len(d.find_elements(By.CSS_SELECTOR, ".tabPanel.active .yasr table tbody tr")) >= 4)
    path = IMAGES / "query-page.png"
    driver.save_screenshot(str(path))
    return path


def main() -> None:
    task = tasks.load("digits")
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        server = stack.enter_context(FleetServer(Path(folder), "home", port=0))
        for i in range(4):
            device = virtual_device(server.broker, "home", f"device-{i}", task.program, task.client(i, 4))
            device.start()
            stack.callback(device.stop)
        driver = browser()
        stack.callback(driver.quit)
        WebDriverWait(server, 30).until(
            lambda s: s.store.query("SELECT ?d { ?d a <https://w3id.org/tinyfleet#Device> }").column("d")[3:]
        )
        path = query_page(driver, server)
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise SystemExit(f"{path} has {size:,} B, more than {MAX_BYTES:,}")
        print(f"{path}: {size:,} B")


if __name__ == "__main__":
    main()
