"""Writes exports/edge_pairs.csv: edge files beside what they replace and beside themselves with four rays, in turns.

    python scripts/benchmarks/edge_pairs.py [--yolo FOLDER] [--csv FILE]

One thread, CPU time, random weights, everything from pixels to polygons (or boxes, or masks) in each file; of YOLO11n-seg,
whose files yolo11n_seg.py writes into FOLDER, the network alone.
"""

import argparse
import functools
import statistics
import sys
import tempfile
from pathlib import Path

import tensorflow as tf
from edge_table import EXPORTS, make, pictures

from polarmask_tf.export import tflite
from polarmask_tf.files import atomic_write, format_csv
from polarmask_tf.tools import benchmark

# What one would build without polar masks: MobileNetV2, FPN-lite and a separable head of 4 x 128 channels, boxes alone.
BOXES = (
    "edge",
    "model.backbone.type=MobileNetV2",
    "model.rays=4",
    "model.fpn.channels=128",
    "model.fpn.conv=separable",
    "model.head.channels=128",
    "model.head.convs=4",
    "model.head.kernel=3",
    "model.head.conv=separable",
)


def export(folder: Path, precision: str, size: int, detections: int, name: str, *settings: str) -> bytes:
    file = folder / "model.tflite"
    model = make(name, size, detections, *settings)
    tflite.export_tflite(model, file, precision, images=functools.partial(pictures, size))
    return file.read_bytes()


def mask_rcnn(folder: Path, size: int) -> bytes:
    """tf-models-official's Mask R-CNN MobileNetV2, the one instance segmentation that its TFLite export knows, in float32."""
    from official.core import exp_factory
    from official.vision.configs import maskrcnn  # noqa: F401, registers the experiment
    from official.vision.serving import detection, export_tflite_lib

    params = exp_factory.get_exp_config("maskrcnn_mobilenet_coco")
    params.task.model.input_size = [size, size, 3]
    module = detection.DetectionModule(params, batch_size=1, input_image_size=[size, size], input_type="tflite")
    signatures = module.get_inference_signatures({"tflite": "serving_default"})
    tf.saved_model.save(module, str(folder / "mask_rcnn"), signatures)
    return export_tflite_lib.convert_tflite_model(saved_model_dir=str(folder / "mask_rcnn"))


def pairs(folder: Path, yolo: Path | None):
    """(what is compared, of which size, detections, precisions, the one relative to ..., ... the other)."""
    for precision in tflite.PRECISIONS:
        yield (
            "36 rays / 4 rays",
            320,
            100,
            precision,
            export(folder, precision, 320, 100, "edge"),
            export(folder, precision, 320, 100, "edge", "model.rays=4"),
        )
    for precision in ("fp32", "int8"):
        for detections in (10, 100):
            yield (
                "edge / MobileNetV2, separable head 4 x 128, boxes only",
                320,
                detections,
                precision,
                export(folder, precision, 320, detections, "edge"),
                export(folder, precision, 320, detections, *BOXES),
            )
    for precision in ("fp32", "int8") if yolo else ():
        theirs = (yolo / f"yolo11n-seg_{precision}.tflite").read_bytes()
        for name, detections in (("edge", 10), ("edge", 100), ("edge_small", 100)):
            ours = export(folder, precision, 320, detections, name)
            yield f"{name} / YOLO11n-seg, its network alone", 320, detections, precision, ours, theirs
    theirs = mask_rcnn(folder, 512)
    for name in ("edge", "edge_small"):
        for precision in ("fp32", "int8"):
            ours = export(folder, precision, 512, 100, name)
            yield f"{name} / Mask R-CNN MobileNetV2 (fp32)", 512, 100, precision, ours, theirs


def compare(files: tuple[bytes, bytes], size: int, repeats: int) -> dict:
    picture = benchmark.synthetic_picture(size, size)
    runners = [benchmark.FileRunner(content, picture, threads=1) for content in files]
    first, second = benchmark.in_turns(runners, repeats, benchmark.WARM_UP)[..., 1].T
    numbers = {"first_ms": first, "second_ms": second, "first/second": first / second}
    return {name: statistics.median(values.tolist()) for name, values in numbers.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--yolo", type=Path, metavar="FOLDER", help="beside YOLO11n-seg too: what yolo11n_seg.py wrote")
    parser.add_argument("--csv", type=Path, default=EXPORTS / "edge_pairs.csv")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for what, size, detections, precision, *files in pairs(Path(folder), args.yolo):
            times = compare(files, size, args.repeats if size < 512 else max(1, args.repeats // 5))
            rows.append({"what": what, "size": size, "detections": detections, "precision": precision, **times})
            print(*(f"{x:.4g}" if isinstance(x, float) else x for x in rows[-1].values()), sep=", ", flush=True)
    atomic_write(args.csv, format_csv(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
