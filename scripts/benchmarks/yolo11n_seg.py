"""Writes yolo11n-seg_fp32.tflite and yolo11n-seg_int8.tflite, 320 x 320, for edge_pairs.py to compare with.

    python -m venv yolo
    yolo/bin/pip install ultralytics litert-torch
    yolo/bin/python scripts/benchmarks/yolo11n_seg.py FOLDER
    python scripts/benchmarks/edge_pairs.py --yolo FOLDER

Made with ultralytics 8.4, litert-torch 0.10 and torch 2.13. Random weights; the network alone, as people deploy it: NMS,
masks and outlines are left to the application. Ultralytics' package is under the AGPL and takes gigabytes with all that it
needs, so it has an environment of its own.
"""

import argparse
import sys
from pathlib import Path

SIZE = 320


def export(folder: Path) -> None:
    import litert_torch
    import numpy as np
    import torch
    from ai_edge_quantizer import quantizer, recipe
    from ultralytics import YOLO

    class ChannelsLast(torch.nn.Module):
        """The network for images [1, SIZE, SIZE, 3] in 0..1, as runtimes give them."""

        def __init__(self):
            super().__init__()
            self.network = YOLO("yolo11n-seg.yaml").model.eval().float().fuse()
            head = self.network.model[-1]
            head.export, head.format = True, "tflite"

        def forward(self, images):
            return self.network(images.permute(0, 3, 1, 2))

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    network = ChannelsLast().eval()
    picture = torch.rand(1, SIZE, SIZE, 3)
    with torch.no_grad():
        network(picture)  # makes the anchors, which a traced network has as constants
    fp32 = folder / "yolo11n-seg_fp32.tflite"
    litert_torch.convert(network, (picture,)).export(str(fp32))
    making = quantizer.Quantizer(str(fp32), recipe.static_wi8_ai8())
    noise = [{"args_0": np.random.default_rng(i).random((1, SIZE, SIZE, 3), np.float32)} for i in range(4)]
    ranges = making.calibrate({"serving_default": noise})
    making.quantize(ranges).export_model(str(folder / "yolo11n-seg_int8.tflite"), overwrite=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    export(parser.parse_args().folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
