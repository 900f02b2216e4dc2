"""Makes a run directory a model that comes with the package: polarmask_tf/models/NAME.

    python scripts/ship_model.py RUN NAME

Weights are rounded to float16, the calibration goes into the config, paths of data are left out. The model card,
README.md beside them, is written by hand: data, AP, licence, what the model is not for.
"""

import dataclasses
import json
import sys
from pathlib import Path

from polarmask_tf import config as configs
from polarmask_tf.files import atomic_write, make_directory
from polarmask_tf.weights import runs, shipped


def ship(run: Path, out: Path) -> None:
    model = runs.load_run(run)
    config = dataclasses.replace(model.config, data=dataclasses.replace(model.config.data, train="", val=""))
    make_directory(out)
    shipped.write_weights(out / shipped.WEIGHTS, runs.named_weights(model))
    atomic_write(out / "config.yaml", configs.dump(config))
    about = json.loads((run / "dataset.json").read_text())
    atomic_write(out / "dataset.json", json.dumps({key: about.get(key) for key in ("classes", "name", "bit_depth")}, indent=1))
    if (run / runs.THRESHOLDS).is_file():
        found = runs.read_thresholds(run, len(model.classes), config.postprocess)
        calibration = {name: getattr(config.postprocess, name) for name in ("temperature", "score_bias")}
        runs.write_bound(out / runs.THRESHOLDS, {**found, **calibration}, "")
    print(f"{out}: {sum(path.stat().st_size for path in out.iterdir()) / 1e6:.1f} MB; write {out / 'README.md'}")


if __name__ == "__main__":
    source, name = sys.argv[1:]
    ship(Path(source), Path(shipped.__file__).parents[1] / "models" / name)
