"""scripts/test's own pytest command, on files made here: a crash, a hang and a skipped test end as failures with a name."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FINE = "import pytest\n@pytest.mark.parametrize('number', range(4))\ndef test_fine(number):\n    pass\n"
# Deadlines in place of the ten minutes of pyproject.toml.
LIMITS = ("-o", "timeout=3", "-o", "faulthandler_timeout=6")


@pytest.fixture
def run(tmp_path):
    """Runs pytest as scripts/test does, with the project's settings and conftest.py, on files {name: content}."""

    def run(files, *arguments, **environment):
        options = re.search(r'^exec python -m pytest (.*) "\$@"$', (ROOT / "scripts/test").read_text(), re.M)[1]
        shutil.copy(ROOT / "tests/conftest.py", tmp_path)
        shutil.copy(ROOT / "pyproject.toml", tmp_path)
        for name, content in files.items():
            (tmp_path / name).write_text(content)
        command = [sys.executable, "-m", "pytest", *shlex.split(options), *arguments, str(tmp_path)]
        environment = {**{key: value for key, value in os.environ.items() if key != "CI"}, **environment}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
        return done.returncode, done.stdout

    return run


def failed(out):
    return re.findall(r"^(?:FAILED|ERROR) (\S+)", out, re.M)


CRASH = "import ctypes\ndef test_before():\n    pass\ndef test_crash():\n    ctypes.string_at(0)\ndef test_after():\n    pass\n"


def test_a_crash_ends_the_run_and_is_named(run):
    """In the last file, whose process had others before: there a process in its place would wait for ever."""
    status, out = run({**{f"test_{name}.py": FINE for name in "abc"}, "test_d.py": CRASH})
    assert status == 1 and failed(out) == ["test_d.py::test_crash"], out
    assert re.search(r"worker 'gw\d' crashed while running 'test_d.py::test_crash'", out)
    assert "13 passed" in out


WAIT = "import threading\ndef test_wait():\n    threading.Event().wait()\ndef test_after():\n    pass\n"
# Never returns and, with the interpreter's lock held, never lets Python look at signals: as a deadlock in C++.
HANG = """import ctypes
def test_hang():
    library, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)
"""


def test_a_test_that_waits_is_the_only_one_to_fail(run):
    status, out = run({"test_a.py": FINE, "test_b.py": WAIT}, *LIMITS)
    assert status == 1 and failed(out) == ["test_b.py::test_wait"] and "5 passed" in out, out
    assert "Timeout" in out


def test_a_hang_in_native_code_ends_the_run_and_is_named(run):
    status, out = run({"test_a.py": FINE, "test_b.py": HANG}, *LIMITS)
    assert status == 1 and failed(out) == ["test_b.py::test_hang"] and "4 passed" in out, out
    assert re.search(r"worker 'gw\d' crashed while running 'test_b.py::test_hang'", out)


SKIPS = {
    "test_a.py": "import pytest\ndef test_tool():\n    pytest.skip('no hammer here')\n",
    "test_b.py": "import pytest\npytest.importorskip('no_such_package')\ndef test_package():\n    pass\n",
    "test_c.py": "import pytest\n@pytest.fixture\ndef tool():\n    pytest.skip('no nails')\ndef test_two(tool):\n    pass\n",
    "test_d.py": "import pytest\n@pytest.mark.skipif(True, reason='no wood here')\ndef test_mark():\n    pass\n",
    "test_e.py": "def test_data(shared):\n    pass\n",
    "test_f.py": "import pytest\n@pytest.mark.xfail\ndef test_known():\n    assert False\n",
}


def test_what_is_skipped_fails_in_ci_alone(run, tmp_path):
    assert not (tmp_path.parent / "shared").exists()
    status, out = run(SKIPS)
    assert (status, failed(out)) == (0, []) and "5 skipped, 1 xfailed" in out, out
    status, out = run(SKIPS, CI="true")
    assert status == 1 and "1 skipped, 1 xfailed" in out and "no ../shared" not in "".join(failed(out)), out
    assert sorted(failed(out)) == ["test_a.py::test_tool", "test_b.py", "test_c.py::test_two", "test_d.py::test_mark"]
    for reason in ("no hammer here", "no_such_package", "no nails", "no wood here"):
        assert reason in out


def test_no_file_of_tests_imports_another():
    for path in (ROOT / "tests").glob("**/*.py"):
        assert not re.search(r"^\s*(?:import|from) test_", path.read_text(), re.M), (
            f"{path}: tests/helpers/ is for what is shared"
        )


@pytest.mark.parametrize(
    ("arguments", "environment", "marks"),
    [([], {}, "-m|not slow|"), ([], {"CI": "true"}, ""), (["-m", ""], {}, "-m||"), (["a.py"], {}, "a.py|")],
)
def test_slow_tests_are_left_out_unless_ci_or_an_argument_says_otherwise(arguments, environment, marks, tmp_path):
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/test", tmp_path / "scripts")
    (tmp_path / "scripts/setup").write_text(f"PATH={tmp_path}:$PATH")
    for name, body in {"ruff": "", "mypy": "", "mkdocs": "", "python": 'printf "%s|" "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**{key: value for key, value in os.environ.items() if key != "CI"}, **environment}
    out = subprocess.check_output(["bash", tmp_path / "scripts/test", *arguments], env=environment, text=True)
    assert out.endswith(f"--max-worker-restart|0|{marks}")
    assert ("Slow tests are left out" in out) == ("not slow" in marks)
