"""The wheel holds what a bare checkout has: every module and the configs."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_wheel_ships_modules_and_configs(tmp_path):
    # From a copy of the tracked files: building in the checkout would leave build/ behind.
    for pattern in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "polarmask_tf/**/*.py", "configs/*.yaml"):
        for file in ROOT.glob(pattern):
            copy = tmp_path / "source" / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    done = subprocess.run([*command, str(tmp_path / "source")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wheel = next(tmp_path.glob("polarmask_tf-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    modules = {str(p.relative_to(ROOT)) for p in ROOT.glob("polarmask_tf/**/*.py")}
    assert modules <= names
    assert {f"polarmask_tf/configs/{p.name}" for p in (ROOT / "configs").glob("*.yaml")} <= names
    code = "import polarmask_tf.config as c; print(c.find('shapes')); c.load('shapes')"
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert found.stdout.strip() == str(tmp_path / "installed/polarmask_tf/configs/shapes.yaml"), found.stderr
