"""A GPU for LiteRT where there is none: SwiftShader, a software Vulkan, which Debian's chromium packages bring with the loader
that finds it."""

import ctypes.util
import json
import os
from pathlib import Path

import pytest

PLACES = ("/usr/lib/chromium", "/usr/lib/chromium-browser", "/opt/google/chrome", "/usr/lib/x86_64-linux-gnu")


def swiftshader(folder):
    """The environment in which LiteRT finds SwiftShader and no other device; its description is written to `folder`."""
    driver = next((path for place in PLACES if (path := Path(place, "libvk_swiftshader.so")).is_file()), None)
    if driver is None:
        pytest.skip("no libvk_swiftshader.so here (Debian: apt-get install chromium)")
    loader = next((place for place in PLACES if Path(place, "libvulkan.so.1").is_file()), None)
    if loader is None and ctypes.util.find_library("vulkan") is None:
        pytest.skip("no libvulkan.so.1 here (Debian: apt-get install libvulkan1)")
    description = folder / "swiftshader.json"
    described = {"file_format_version": "1.0.0", "ICD": {"library_path": str(driver), "api_version": "1.0.5"}}
    description.write_text(json.dumps(described))
    environment = no_device(description)
    if loader:
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, (loader, os.environ.get("LD_LIBRARY_PATH"))))
    return environment


def no_device(description="/nowhere.json"):
    """The environment in which no device is found but that described in a file."""
    return {**os.environ, "VK_ICD_FILENAMES": str(description), "VK_DRIVER_FILES": str(description)}
