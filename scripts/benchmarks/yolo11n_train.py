"""YOLO11n-seg trained from scratch by its own trainer for so many CPU-minutes, measured by pycocotools: to compare with.

    python -m venv yolo
    yolo/bin/pip install ultralytics pycocotools
    yolo/bin/python scripts/benchmarks/yolo11n_train.py TRAIN.json IMAGES VAL.json IMAGES --out FOLDER --size 320

An epoch is timed first, and as many are trained as fit into the minutes (user and system time of the process, on the threads
that it gets). Ultralytics' defaults otherwise, weights from yolo11n-seg.yaml or with --pretrained from yolo11n-seg.pt. Every
object is its largest polygon, as in ours. AP of the masks as its predictor gives them, at the images' own size.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np


def largest_ring(segmentation) -> np.ndarray:
    """Corners [n, 2] of the largest polygon; of a run-length encoded mask, of its contour through the pixels' middles, as
    YOLO's own converters trace it."""
    if isinstance(segmentation, list):
        return np.reshape(max(segmentation, key=len), (-1, 2))
    import cv2  # which ultralytics brings
    from pycocotools import mask

    if isinstance(segmentation["counts"], list):
        segmentation = mask.frPyObjects(segmentation, *segmentation["size"])
    contours, _ = cv2.findContours(mask.decode(segmentation), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return max(contours, key=cv2.contourArea)[:, 0].astype(float)


def write_yolo(annotations: Path, images: Path, folder: Path) -> list[str]:
    """COCO to YOLO's folders images/ (links) and labels/; returns the class names."""
    document = json.loads(annotations.read_text())
    ids = [category["id"] for category in sorted(document["categories"], key=lambda c: c["id"])]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "labels").mkdir(exist_ok=True)
    objects = {}
    for entry in document["annotations"]:
        if not entry.get("iscrowd"):
            objects.setdefault(entry["image_id"], []).append(entry)
    for image in document["images"]:
        name = Path(image["file_name"]).name
        link = folder / "images" / name
        if not link.exists():
            os.symlink((images / image["file_name"]).resolve(), link)
        lines = []
        for entry in objects.get(image["id"], ()):
            points = largest_ring(entry["segmentation"]) / (image["width"], image["height"])
            lines.append(f"{ids.index(entry['category_id'])} " + " ".join(f"{v:.6f}" for v in points.clip(0, 1).ravel()))
        (folder / "labels" / f"{Path(name).stem}.txt").write_text("\n".join(lines))
    names = {category["id"]: category["name"] for category in document["categories"]}
    return [names[i] for i in ids]


def train(data: Path, epochs: int, args, name: str):
    """(model, CPU seconds at the start and after each epoch)."""
    from ultralytics import YOLO

    model = YOLO("yolo11n-seg.pt" if args.pretrained else "yolo11n-seg.yaml")
    options = {"workers": 0, "device": "cpu", "val": False, "plots": False, "verbose": False, "seed": args.seed}
    times = [time.process_time()]
    model.add_callback("on_train_epoch_end", lambda trainer: times.append(time.process_time()))
    model.train(
        data=str(data), epochs=epochs, imgsz=args.size, batch=args.batch, project=str(args.out), name=name,
        exist_ok=True, pretrained=args.pretrained, patience=0, **options,
    )  # fmt: skip
    return model, times


def measure(model, annotations: Path, images: Path, size: int) -> np.ndarray:
    from pycocotools import mask as coco_mask
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO(str(annotations))
    ids, results = sorted(truth.cats), []
    for image in truth.dataset["images"]:
        options = {"imgsz": size, "conf": 0.001, "max_det": 1000, "retina_masks": True, "device": "cpu", "verbose": False}
        found = model.predict(str(images / image["file_name"]), **options)[0]
        if found.masks is None:
            continue
        masks = found.masks.data.cpu().numpy().astype(np.uint8)
        for mask, score, label in zip(masks, found.boxes.conf.tolist(), found.boxes.cls.tolist(), strict=True):
            rle = coco_mask.encode(np.asfortranarray(mask))
            rle["counts"] = rle["counts"].decode()
            entry = {"image_id": image["id"], "category_id": ids[int(label)]}
            results.append({**entry, "score": score, "segmentation": rle})
    if not results:
        return np.zeros(3)
    evaluation = COCOeval(truth, truth.loadRes(results), "segm")
    evaluation.params.maxDets = [1, 100, 1000]
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"][..., 0, -1]  # of all sizes, up to 1,000 detections an image
    chosen = (precision, precision[:1], precision[5:6])
    return np.array([np.mean(p[p > -1]) if (p > -1).any() else -1 for p in chosen])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("train", "train_images", "val", "val_images"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pretrained", action="store_true")
    args = parser.parse_args()
    args.out = args.out.resolve()
    names = write_yolo(args.train, args.train_images, args.out / "train")
    data = args.out / "data.yaml"
    data.write_text(json.dumps({"path": str(args.out), "train": "train/images", "val": "train/images", "names": names}))
    _, times = train(data, 3, args, "timing")
    epochs = max(1, round((args.minutes * 60 - (times[1] - times[0])) / ((times[3] - times[1]) / 2)) + 1)
    model, times = train(data, epochs, args, f"seed{args.seed}")
    seconds = times[-1] - times[0]
    ap, ap50, ap75 = measure(model, args.val, args.val_images, args.size)
    print(f"{epochs} epochs, {seconds / 60:.1f} CPU-minutes: mask AP {ap:.3f}, AP50 {ap50:.3f}, AP75 {ap75:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
