"""Pages in headless Chromium, by playwright-core of exports/web/package.json."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from helpers import npm

WEB = Path(__file__).resolve().parents[2] / "exports/web"
DRIVER = Path(__file__).parent / "web_page.mjs"


def node_modules(pytestconfig):
    """What exports/web/package.json asks for, installed once into pytest's cache."""
    return npm.install(pytestconfig, "web", (WEB / "package.json").read_bytes())


def find_chromium():
    """Its path; a test that cannot have it is skipped."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    return chromium


class Page:
    """The page in a browser of its own; see web_page.mjs. Every call fails if the page had an uncaught exception."""

    def __init__(self, folder, chromium, *flags):
        command = ["node", str(folder / DRIVER.name), chromium, *flags]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, **command):
        self.process.stdin.write(json.dumps(command, default=str) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the browser did not start, or ended"
        answer = json.loads(line)
        assert "error" not in answer, answer["error"]
        assert answer["uncaught"] == []
        return answer.get("value")  # none of a function that returns nothing

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=30)
