"""A headless Chromium for the tests of pages, driven through Playwright; tests skip where one of them is missing."""

import contextlib
import os
import shutil
from typing import NamedTuple

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
LAPTOP, PHONE = (1280, 800), (360, 740)


def executable():
  """The path of Chromium: that of the variable CHROMIUM, or one on the path. The test skips where there is none."""
  found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
  if found is None:
    pytest.skip("Chromium is not installed: apt-get install chromium, or give its path in the variable CHROMIUM")
  return found


@contextlib.contextmanager
def launched():
  """A running browser, for all tests of a file."""
  playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
  path = executable()
  with playwright.sync_playwright() as driver:
    browser = driver.chromium.launch(executable_path=path, args=["--headless=new", "--no-sandbox"])
    try:
      yield browser
    finally:
      browser.close()


class Opened(NamedTuple):
  """An open page, with what the browser said about it.

  Args:
    page: Playwright's page.
    messages: all messages of the console and all uncaught errors; the list grows.
    requests: the addresses of all requests but that of the file and of data in it; the list grows.
  """

  page: object
  messages: list
  requests: list

  def screenshot(self, path, whole=False):
    """Write what is seen, or the whole page, as a PNG file."""
    self.page.screenshot(path=str(path), full_page=whole)

  def violations(self):
    """What axe-core finds against accessibility, as a text for each rule; empty if it finds nothing."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python")
    found = axe.Axe().run(self.page, options={"resultTypes": ["violations"]}).response["violations"]
    return [f"{rule['id']}: {node['target']} {node['failureSummary']}" for rule in found for node in rule["nodes"]]


@contextlib.contextmanager
def opened(browser, path, size=LAPTOP, scheme="light", media="screen"):
  """Open a file in a window of a size in CSS pixels, on a light or dark system; ``media`` may be ``"print"``."""
  # The page's policy would forbid the script of axe-core, which looks at the page and is not part of it.
  context = browser.new_context(
    viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, bypass_csp=True, offline=True
  )
  try:
    page = context.new_page()
    page.emulate_media(media=media, color_scheme=scheme)
    messages, requests = [], []
    page.on("console", lambda message: messages.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: messages.append(f"error: {error}"))
    own = f"file://{path}"
    page.on("request", lambda r: r.url == own or r.url.startswith("data:") or requests.append(r.url))
    page.goto(own)
    yield Opened(page, messages, requests)
  finally:
    context.close()
