"""Take the picture of the index that README.md shows: ``python tests/picture.py`` after a run of the paper preset."""

import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

REPORTS = Path(__file__).resolve().parent.parent / "reports" / "paper"

if __name__ == "__main__":
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1180, "height": 1000})
        page.goto((REPORTS / "index.html").as_uri())
        page.screenshot(path=REPORTS / "figures" / "index.png")
        browser.close()
