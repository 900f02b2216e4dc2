"""Writes configs/costs.csv: parameters, multiply-adds and CPU time of every shipped config; keeps the column of APs.

    python scripts/benchmarks/config_costs.py [NAME ...]

Without names, of all. CPU time is the median of three calls for one image, with post-processing, of all threads; of networks
with more than 50 G multiply-adds, which are for GPUs, it is left out.
"""

import argparse
import csv

from polarmask_tf import config as configs
from polarmask_tf.tools.benchmark import benchmark_models
from polarmask_tf.tools.catalogue import COSTS, headers, read_costs
from polarmask_tf.tools.summary import input_size, summarize

COLUMNS = ("config", "input", "parameters_m", "gmac", "cpu_ms", "ap")


def measure(name: str, ap: str) -> dict:
    config = configs.load(name)
    size = input_size(config.data)
    total = summarize(config, 80, size)[-1]
    gmac = total["multiply_adds"] / 1e9
    times = f"{benchmark_models([name], repeats=3)[-1]['cpu_ms']:.0f}" if gmac <= 50 else ""
    return {
        "config": name,
        "input": f"{size[0]}x{size[1]}",
        "parameters_m": f"{total['parameters'] / 1e6:.1f}",
        "gmac": f"{gmac:.2f}",
        "cpu_ms": times,
        "ap": ap,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="configs (default: all)")
    names = parser.parse_args().names
    path = configs.configs_dir() / COSTS
    rows = read_costs() if path.is_file() else {}
    for name in headers():
        if not names or name in names:
            rows[name] = measure(name, rows.get(name, {}).get("ap", ""))
            print(rows[name], flush=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[name] for name in headers() if name in rows)


if __name__ == "__main__":
    main()
