"""Behind scripts/reproduce_tables: each row of a table is a config; rows with equal settings share one training.

Interrupted, it goes on where it was: finished trainings and measurements are kept under --out.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import yaml

from polarmask_tf import config as configs
from polarmask_tf.errors import InputError

# Row: config, what the paper calls it, the paper's AP on minival (table 2: test-dev), what replaces the row's settings in
# the small network (None: nothing does, the same diff is laid over configs/reduced.yaml).
TABLES = {
    "1a": [(f"table1a_rays{n}", f"{n} rays", ap, None) for n, ap in ((18, 26.2), (24, 27.3), (36, 27.7), (72, 27.6))],
    "1b": [
        ("table1b_smooth_l1_005", "Smooth-L1, alpha = 0.05", 24.7, None),
        ("table1b_smooth_l1_030", "Smooth-L1, alpha = 0.30", 25.1, None),
        ("table1b_smooth_l1_100", "Smooth-L1, alpha = 1.00", 20.2, None),
        ("table1b_polar_iou", "Polar IoU", 27.7, None),
    ],
    "1c": [("table1c_cartesian", "Cartesian centerness", 27.7, None), ("table1c_polar", "polar centerness", 29.1, None)],
    "1d": [("table1d_with_box", "with box branch", 27.7, None), ("table1d_without_box", "without box branch", 27.5, None)],
    "1e": [
        ("table1e_r50", "ResNet-50", 29.1, {}),
        ("table1e_r101", "ResNet-101", 30.4, {"model": {"backbone": {"blocks": [1, 1, 3, 1]}}}),
        (
            "table1e_x101",
            "ResNeXt-101",
            32.6,
            {"model": {"backbone": {"blocks": [1, 1, 3, 1], "block": "bottleneck", "groups": 8, "group_width": 4}}},
        ),
    ],
    "1f": [
        (f"table1f_{side}", f"shorter side {side}", ap, {"data": {"size": [small, small]}})
        for side, ap, small in ((400, 22.9, 64), (600, 27.6, 96), (800, 29.1, 128))
    ],
    "2": [
        ("table2_r101", "ResNet-101, test-dev", 30.4, {"model": {"backbone": {"blocks": [1, 1, 3, 1]}}}),
        (
            "table2_x101",
            "ResNeXt-101, test-dev",
            32.9,
            {"model": {"backbone": {"blocks": [1, 1, 3, 1], "block": "bottleneck", "groups": 8, "group_width": 4}}},
        ),
    ],
}
METRICS = ("AP", "AP50", "AP75", "APS", "APM", "APL")
HARD_KINDS = "circle,rectangle,triangle,star,bar,ellipse,ell,cee"  # half of them elongated or concave


def main() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    args = _arguments()
    unknown = [table for table in args.tables if table not in TABLES]
    if unknown:
        raise InputError(f"no table {unknown[0]}; there are {', '.join(TABLES)}")
    train, val = _data(args)
    rows = [(table, *row) for table in args.tables or TABLES for row in TABLES[table]]
    settings = {row[1]: _config(args, row[1], row[4]) for row in rows}
    runs = {}  # settings -> directory
    for name, config in settings.items():
        runs.setdefault(configs.dump(config), args.out / "runs" / name)
    results = []
    for number, (table, name, label, published, _) in enumerate(rows, 1):
        print(f"== {number} of {len(rows)}: table {table}, {label}", flush=True)
        run = runs[configs.dump(settings[name])]
        numbers = [_measure(run, args.out / "configs" / f"{name}.yaml", seed, train, val) for seed in args.seeds]
        results.append({"table": table, "row": label, "paper": published, "numbers": numbers})
        _write(args, results)
    if {"table1b_smooth_l1_030", "table1b_polar_iou"} <= set(settings) and args.images:
        _figure6(args, runs, settings)
    print(f"wrote {args.out / 'tables.md'} and {args.out / 'tables.csv'}")


def _arguments():
    parser = argparse.ArgumentParser(prog="scripts/reproduce_tables", description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", help=f"of {', '.join(TABLES)} (default: all)")
    parser.add_argument("--data", type=Path, help="converted training data; with --small, drawn shapes if it is left out")
    parser.add_argument("--val", type=Path, help="converted validation data")
    parser.add_argument("--images", type=Path, help="directory of the validation images, for figure 6")
    parser.add_argument("--out", type=Path, default=Path("out/tables"), help="default %(default)s")
    parser.add_argument("--small", action="store_true", help="each row's settings over configs/reduced.yaml: a tiny network")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one training each (default 0)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, in every row")
    return parser.parse_args()


def _data(args):
    if args.data and args.val:
        return args.data, args.val
    if not args.small or args.data or args.val:
        raise InputError("give --data and --val, directories made by `polarmask convert` (or --small alone: drawn shapes)")
    shapes, data = args.out / "shapes", args.out / "data"
    args.images = args.images or shapes / "val" / "images"
    if not (data / "val" / "dataset.json").is_file():
        _polarmask("shapes", shapes, "--kinds", HARD_KINDS, "--seed", "101")
        for split in ("train", "val"):
            _polarmask("convert", shapes / split / "annotations.json", shapes / split / "images", data / split)
    return data / "train", data / "val"


def _config(args, name, small):
    """The row's settings, also written to OUT/configs: as shipped, or its diff over the small base."""
    path = args.out / "configs" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    base, diff = name, {}
    if args.small:
        base, diff = "reduced", _diff(name) if small is None else small
    values = configs.load(base, args.set)
    merged = yaml.safe_load(configs.dump(values))
    _merge(merged, diff)
    for override in args.set:  # they win over the row too
        key, _, text = override.partition("=")
        value = yaml.safe_load(text)
        for part in reversed(key.split(".")):
            value = {part: value}
        _merge(merged, value)
    path.write_text(yaml.safe_dump(merged))
    return configs.load(path)


def _diff(name):
    """What the files from paper_1x.yaml up to this row say."""
    values = yaml.safe_load(configs.find(name).read_text())
    base = values.pop("base")
    below = {} if base == "paper_1x.yaml" else _diff(base.removesuffix(".yaml"))
    _merge(below, values)
    return below


def _merge(below, above):
    for key, value in above.items():
        if isinstance(value, dict):
            _merge(below.setdefault(key, {}), value)
        else:
            below[key] = value


def _measure(run, config, seed, train, val):
    """The COCO numbers of one training, which is done first if it has not been."""
    run = run.with_name(f"{run.name}_seed{seed}")
    file = run / "metrics.json"
    if not file.is_file():
        _polarmask("train", "--config", config, "--data", train, "--out", run, "--set", f"train.seed={seed}")
        _polarmask("evaluate", run, "--data", val, "--json", file)
    return json.loads(file.read_text())["values"]


def _write(args, results):
    seeds = ", ".join(map(str, args.seeds))
    lines = [
        "Small network (configs/reduced.yaml), not the paper's: compare rows with each other only."
        if args.small
        else "Full size.",
        f'Mask AP x 100, mean over seeds {seeds} (each seed\'s AP in brackets). "Paper" is the published AP on COCO.',
        "",
    ]
    for table in dict.fromkeys(result["table"] for result in results):
        lines += [f"## Table {table}", "", f"| | paper | {' | '.join(METRICS)} |", "|---" * (len(METRICS) + 2) + "|"]
        for result in (r for r in results if r["table"] == table):
            means = [statistics.mean(numbers[metric] for numbers in result["numbers"]) for metric in METRICS]
            cells = [f"{100 * mean:.1f}" if mean >= 0 else "-" for mean in means]  # -1: no object of this size
            if len(args.seeds) > 1:
                cells[0] += " (" + ", ".join(f"{100 * numbers['AP']:.1f}" for numbers in result["numbers"]) + ")"
            lines.append(f"| {result['row']} | {result['paper']} | {' | '.join(cells)} |")
        lines.append("")
    _replace(args.out / "tables.md", "\n".join(lines))
    with open(args.out / "tables.csv.tmp", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["table", "row", "paper_AP", "seed", *METRICS])
        for result in results:
            for seed, numbers in zip(args.seeds, result["numbers"], strict=True):
                writer.writerow(
                    [result["table"], result["row"], result["paper"], seed, *(round(numbers[m], 4) for m in METRICS)]
                )
    os.replace(args.out / "tables.csv.tmp", args.out / "tables.csv")


def _figure6(args, runs, settings):
    from polarmask_tf.inference.predictor import load_predictor

    predictors = {
        label: load_predictor(
            runs[configs.dump(settings[name])].with_name(f"{runs[configs.dump(settings[name])].name}_seed{args.seeds[0]}")
        )
        for label, name in (("Smooth-L1", "table1b_smooth_l1_030"), ("Polar IoU", "table1b_polar_iou"))
    }
    # Small networks are less sure of themselves.
    compare(predictors, args.images, args.out / "figure6.png", score_threshold=0.2 if args.small else 0.3)


def compare(predictors, folder, out, *, score_threshold, images=6):
    """Writes the picture `out`: what each of `predictors` (name -> Predictor) finds in the same images of `folder`.

    Up to `images` of its files are taken, spread over all.
    """
    from polarmask_tf.inference import visualize

    paths = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    cells = []
    for path in dict.fromkeys(paths[i * (len(paths) - 1) // max(images - 1, 1)] for i in range(images)):
        found = [predictor(path).above(score_threshold) for predictor in predictors.values()]
        pictures = [one.plot(fit=visualize.SHEET_SIDE) for one in found]
        cells.append((*pictures, f"{path.name}: {', '.join(str(len(one)) for one in found)} found"))
    visualize.save(visualize.sheet(cells, heads=tuple(predictors)), out)


def _polarmask(*arguments):
    done = subprocess.run([sys.executable, "-m", "polarmask_tf", *map(str, arguments)], check=False)
    if done.returncode:
        sys.exit(done.returncode)  # it has said why


def _replace(path, text):
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text)
    os.replace(beside, path)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        print(f"reproduce_tables: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("reproduce_tables: interrupted; the same command goes on")
