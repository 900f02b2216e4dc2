"""Set before any test imports TensorFlow: quiet start-up, no GPU surprises. And what CI does not let pass."""

import gc
import importlib.util
import os
import signal
import sys
from pathlib import Path

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# torch.optim imports it, and with TensorFlow 2.21 in the same process that is a segmentation fault. Nothing here needs it.
sys.modules["triton"] = None
# A shell that starts this in the background makes it ignore Ctrl-C, and with it the processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))  # for scripts/benchmarks
SHARED = Path(__file__).resolve().parents[2] / "shared"
NO_SHARED = "no ../shared beside this checkout"  # the one thing that is not everybody's to install
NO_GARDEN = "needs the extra `garden`"  # which pins TensorFlow 2.20: what runs on another leaves it out (scripts/setup)
pytest.register_assert_rewrite("helpers")

# Of two processes that share the files out, neither should begin a long one when the other has none left.
LONG = ("test_kills.py", "test_layouts.py", "test_end_to_end.py", "test_paper.py", "test_train.py", "test_reproduce_tables.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def pytest_collection_finish():
    """What imports have made stays, a million objects of TensorFlow's: looking at it again and again is a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_runtest_setup(item):
    if item.get_closest_marker("garden") and importlib.util.find_spec("official") is None:
        pytest.skip(NO_GARDEN)


def fail_instead_of_skip(report):
    """With CI=true nothing is left out without a word: what is missing has to be installed (.ci/run does)."""
    if os.environ.get("CI") == "true" and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        left_out = "garden" not in os.environ.get("extras", "garden") and NO_GARDEN in reason  # noqa: SIM112
        if NO_SHARED not in reason and not left_out:
            report.outcome, report.longrepr = "failed", f"{report.nodeid}: with CI=true this may not be left out: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    return fail_instead_of_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    return fail_instead_of_skip((yield))


@pytest.fixture(scope="session")
def shared():
    """The folder of real data and golden arrays that sits beside some checkouts; tests that need it skip without it."""
    if not SHARED.is_dir():
        pytest.skip(NO_SHARED)
    return SHARED


@pytest.fixture(scope="session")
def node_modules(pytestconfig):
    """What exports/web/package.json asks for, installed once into pytest's cache."""
    from helpers import browser

    return browser.node_modules(pytestconfig)


@pytest.fixture(scope="session")
def chromium():
    from helpers import browser

    return browser.find_chromium()
