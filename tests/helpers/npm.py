"""Packages of npm's registry, for tests."""

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest


def install(pytestconfig, name, package):
    """What a package.json, in bytes, asks for, installed once into pytest's cache -> its folder node_modules."""
    missing = [tool for tool in ("node", "npm") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)} here (Debian: apt-get install nodejs npm)")
    folder = Path(pytestconfig.cache.mkdir(f"{name}-{hashlib.sha256(package).hexdigest()[:12]}"))
    if not (folder / "node_modules/.package-lock.json").exists():  # which npm writes last
        (folder / "package.json").write_bytes(package)
        command = "npm install --no-package-lock --no-audit --no-fund --loglevel=error --fetch-retries=1"
        try:
            done = subprocess.run(command.split(), cwd=folder, capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            pytest.skip("npm install took more than 5 minutes")
        if done.returncode:
            pytest.skip(f"npm install failed: {' '.join(done.stderr.split())[:300]}")
    return folder / "node_modules"
