"""`polarmask predict`: pictures in, files out, by whichever predictor."""

import contextlib
import itertools
import sys
from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm import tqdm

import polarmask_tf
from polarmask_tf import files, lite
from polarmask_tf.errors import InputError, counted
from polarmask_tf.inference import inputs, outputs, visualize
from polarmask_tf.inference import truth as ground_truth
from polarmask_tf.inference.journal import NAME, Journal, digest, digest_of_file, digest_of_model
from polarmask_tf.inference.results import class_indices, read_image

SHEET_IMAGES = 12
SMALL = 8  # pixels of the network's input: what is smaller is found by luck
_TOO_SMALL = (
    f"a quarter of the objects is under {SMALL} pixels once the image is shrunk to the network's input; --tile N looks at "
    "parts of N x N pixels, and may find more (docs/large.md)"
)


def predict(
    predictor,
    sources,
    out,
    *,
    save=None,
    segmentation="rle",
    score_threshold=None,
    classes=None,
    every=1,
    truth=None,
    limit=None,
    results_only=False,
    exif="ignore",
    bit_depth=None,
    resume=False,
    model=None,
    accelerator=None,
    progress=True,
):
    """Run `predictor` over (the first `limit`) pictures, and write what it finds.

    sources: a path or several: image files, videos (of which every `every`-th frame is taken), folders with all below them,
    patterns, "-" for stdin; see inputs.find. save: names of outputs.KINDS; default: outputs.DEFAULT, which is
    out/overlays/NAME.png, the image with its polygons, and out/results.json, COCO results with the original category ids and
    the image's id in `truth` (a COCO JSON, which may lack annotations), else its file name's number, else its file name.
    With overlays there is out/sheet.png: up to 12 of the images (figure 8), beside their ground truth where `truth` has
    annotations. segmentation: "rle" or "polygon", in results.json. Taken are detections from `score_threshold` on (a number or
    one of each class; default: predictor.default_threshold), of `classes` (names; default: all). With `results_only` there is
    results.json alone, the threshold is the predictor's own, and of the pictures only those of `truth` are taken: what an
    evaluation server wants. `exif` and `bit_depth` (default: the predictor's) are lite.read_image's: with exif="apply"
    coordinates are those of the turned image.
    Files that are no images, and then images of `truth` that are not there, are named on stderr, counted and left out.

    What is finished is kept in out/unfinished.jsonl until all is. With `resume` an interrupted run goes on behind it; `model`
    is the path or URL of the predictor's model, by whose content it knows whether it is the same, and `accelerator` is what
    load_predictor got. Memory is that of a picture.

    Returns {"images", "detections", "skipped": {name: reason}, "missing": [file name], "results": Path | None, "sheet": Path |
    None, "written": [Path]}. Raises InputError if no file is an image, if `out` is in use or cannot be written, and if
    `resume` finds a run of another model, of other inputs or options, or one that is finished.
    """
    out = Path(out)
    if results_only and save is not None:
        raise InputError("--results-only writes results.json alone: leave --save out")
    kinds = outputs.check(save if save is not None else ("coco",) if results_only else outputs.DEFAULT)
    if segmentation not in ("rle", "polygon"):
        raise InputError(f"segmentation is {segmentation!r}, must be 'rle' or 'polygon'")
    if every < 1:
        raise InputError(f"every is {every}, must be at least 1")
    if classes is not None:
        class_indices(predictor.classes, classes)
    said = ""
    if score_threshold is None:
        score_threshold, why = (0.0, "") if results_only else predictor.default_threshold()
        said = f"showing detections {why}" if why and progress else ""
    plan = _Plan(sources, out, truth, results_only, limit)
    if not resume:  # which replaces nothing but the picture that was being written
        outputs.check_replaceable(kinds, out, plan.inputs, truth)
    exact = {"exif": exif, "bit_depth": bit_depth or predictor.bit_depth}
    settings = {
        "version": polarmask_tf.__version__,
        "model": model and digest_of_model(model),
        "inputs": plan.digest(),
        "truth": truth and digest_of_file(truth),
        **{"save": kinds, "segmentation": segmentation, "score_threshold": score_threshold, "classes": classes},
        **{"every": every, "limit": limit, **exact, "accelerator": accelerator or "default"},
        **{name: getattr(predictor, name, None) for name in ("tile", "overlap")},
    }
    draws_sheet = any(kind.startswith("overlays") for kind in kinds)
    shown = _spread(plan.can_be_shown(), SHEET_IMAGES) if draws_sheet else []
    tally, cells = _Tally(), {}
    read = getattr(predictor, "read", read_image)  # of tiles.py, which opens large pictures
    with files.lock(out, "predict"), _journal(out, settings, resume, kinds, tally) as record:
        pictures = itertools.islice(inputs.pictures(plan.inputs, plan.ids, read=read, every=every, **exact), limit)
        for number, picture in enumerate(tqdm(pictures, "predict", plan.number(), unit="image", disable=not progress)):
            is_done, is_shown = number < record.count_before, picture.input in shown and picture.input not in cells
            if is_done and not is_shown:
                continue
            try:
                image = picture.read()
            except InputError as error:
                if not is_done:
                    if plan.number() != 1:  # the last line tells of one alone
                        tqdm.write(f"skipped {error}", file=sys.stderr)
                    record.append(tally.add({"name": picture.name, "skipped": str(error)}))
                continue
            if not is_done:
                outputs.check_size(kinds, segmentation, picture.name, image)
            if said:  # now that nothing is refused any more
                tqdm.write(said, file=sys.stderr)
                said = ""
            found = predictor(image).above(score_threshold)
            if not isinstance(image, np.ndarray):
                picture.notes.extend(image.notes())
            found = found if classes is None else found.only(classes)
            if _is_too_small(found, predictor) and _TOO_SMALL not in picture.notes:
                picture.notes.append(_TOO_SMALL)
            if not is_done:
                truths = plan.shapes(picture, image) if "gallery" in kinds else None
                one = outputs.Predicted(picture, image, found, truths)
                record.append(tally.add(outputs.write_picture(kinds, out, one, segmentation)))
            if is_shown and isinstance(image, np.ndarray):  # not windows of a large picture
                cells[picture.input] = plan.cell(picture, image, found, predictor.classes)
        tally.report(plan.where)
        least = float(np.min(score_threshold))
        page = {"title": out.resolve().name, "categories": predictor.classes, "least": least, "truth": plan.has_annotations}
        outputs.write_tables(kinds, out, record, **page)
        if draws_sheet:
            _save_sheet(cells, plan, tally.images, out)
    counts = {"images": tally.images, "detections": tally.objects, "skipped": tally.skipped, "missing": plan.missing}
    paths = {"results": out / outputs.RESULTS if "coco" in kinds else None, "sheet": out / outputs.SHEET if cells else None}
    return {**counts, **paths, "written": outputs.written(kinds, out, bool(cells))}


def _is_too_small(found, predictor):
    """Whether the image is shrunk to a half or less for the network, and then shows it hardly anything of what is there."""
    size, tile = (getattr(predictor, name, None) for name in ("input_size", "tile"))
    if tile or not size or None in size:  # not every server tells its size
        return False
    scale = min(np.divide(size, found.image_size))
    sides = np.sqrt((found.boxes[:, 2:] - found.boxes[:, :2]).clip(0).prod(axis=1)) * scale
    return scale <= 0.5 and len(sides) > 0 and np.percentile(sides, 25) < SMALL


class _Plan:
    """What is to be predicted on, and what the truth knows of it."""

    def __init__(self, sources, out, truth, results_only, limit):
        sources = inputs.check(sources)
        self.inputs, self.missing, self.truth = inputs.find(sources, outputs.own(out)), [], truth
        self.where = f"{sources[0]}{' and others' * (len(sources) > 1)}"
        self.dataset = ground_truth.read(truth) if truth is not None else None
        self.known = ground_truth.entries(self.inputs, self.dataset)
        if results_only and self.dataset is not None:
            chosen = ground_truth.only_named(self.inputs, self.known, self.dataset, self.where, truth)
            self.inputs, self.missing = chosen
        self.inputs = self.inputs[:limit]
        self.ids = ground_truth.image_ids(self.inputs, self.known, self.dataset)
        self.has_annotations = bool(self.dataset and self.dataset["annotations"])

    def digest(self):
        return digest(*((entry.name, entry.stem, self.ids[entry]) for entry in self.inputs))

    def number(self):
        """Of pictures, None where there are videos."""
        return None if any(entry.is_video for entry in self.inputs) else len(self.inputs)

    def can_be_shown(self):
        likely = [entry for entry in self.inputs if not entry.name.lower().endswith(inputs.NO_PICTURES)]
        return [entry for entry in likely if not self.has_annotations or entry in self.known]

    def shapes(self, picture, image):
        """The truth of a picture, None without any."""
        if not self.has_annotations or picture.input not in self.known:
            return None
        return ground_truth.shapes(self.known[picture.input]["id"], image, self.dataset)

    def cell(self, picture, image, found, classes):
        entry = self.known[picture.input] if self.has_annotations else None
        name = lite.one_line(PurePosixPath(picture.name).name)
        return ground_truth.cell(name, image, found, classes, entry, self.dataset)


class _Tally:
    """What was done with the pictures so far, also before an interruption."""

    def __init__(self):
        self.images, self.objects, self.skipped, self.notes = 0, 0, {}, Counter()

    def add(self, entry):
        """Counts an entry of the journal, and returns it."""
        if "skipped" in entry:
            self.skipped[entry["name"]] = entry["skipped"]
        else:
            self.images += 1
            self.objects += entry["objects"]
            self.notes.update(entry["notes"])
        return entry

    def report(self, where):
        """Says what was skipped and what was noted; InputError if there were no images."""
        if not self.images:
            reason = next(iter(self.skipped.values()), "no files")
            raise InputError(f"{where}: no image to predict on: {reason}" + (", ..." if len(self.skipped) > 1 else ""))
        if self.skipped:
            total = self.images + len(self.skipped)
            print(f"skipped {len(self.skipped)} of {total} files: {inputs.some(self.skipped)}", file=sys.stderr)
        for note, count in self.notes.items():
            hint = " (--exif apply turns them; if the model learned from turned photos, see convert's notes, it needs that)"
            print(f"note: {count} of {self.images} images: {note}{hint * note.startswith('EXIF')}", file=sys.stderr)


@contextlib.contextmanager
def _journal(out, settings, resume, kinds, tally):
    """The Journal of `out`, counted into `tally`; it stays only if what it is used for fails with something finished."""
    there = (out / NAME).exists()
    finished = [path for kind in kinds if kind in outputs.TABLES and (path := out / outputs.TABLES[kind]).exists()]
    if resume and not there and finished:
        what = f"{finished[0].name} there is of a finished run, which a run without --resume replaces"
        raise InputError(f"{out}: no interrupted run to resume: {what}")
    if there and not resume:
        print(f"starting over: what an interrupted run had finished in {out} is done again (--resume goes on)", file=sys.stderr)
    record = Journal(out, settings, resume=resume)
    try:
        for number, entry in enumerate(record.entries(), 2):
            if not outputs.is_entry(kinds, entry):
                raise InputError(f"{record.path}: damaged in line {number}; leave --resume out to start over")
            tally.add(entry)
        yield record
        record.remove()
    except BaseException:
        record.close()
        if not tally.images and not record.count_before:
            record.remove()
        else:
            finished = f"finished: {counted(tally.images, 'image')}"
            print(f"{finished}; the same command with --resume goes on from there", file=sys.stderr)
        raise


def _spread(items, count):
    """Up to `count` of the items, evenly from the first to the last."""
    return [items[i] for i in dict.fromkeys(np.linspace(0, len(items) - 1, count).astype(int).tolist())] if items else []


def _save_sheet(cells, plan, images, out):
    if plan.has_annotations and not cells:
        print(f"no sheet.png: {plan.truth} names none of the images in {plan.where}", file=sys.stderr)
    if cells:
        heads = ("ground truth", "prediction") if plan.has_annotations else ()
        title = f"PolarMask, {len(cells)} of {images} images"
        visualize.save(visualize.sheet(list(cells.values()), heads=heads, title=title), out / outputs.SHEET)
