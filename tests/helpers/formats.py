"""A COCO set written in each of the other formats that `convert` reads, as their tools write it."""

import base64
import io
import json
import shutil
from xml.sax.saxutils import quoteattr

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from polarmask_tf.data import contours


def by_image(document):
    """(image, [(class name, segmentation), ...]) of a COCO document."""
    names = {category["id"]: category["name"] for category in document["categories"]}
    for image in document["images"]:
        mine = [a for a in document["annotations"] if a["image_id"] == image["id"]]
        yield image, [(names[a["category_id"]], a["segmentation"]) for a in mine]


def bitmap(shape, image):
    if isinstance(shape, list):
        return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(shape, image["height"], image["width"])))
    counts = shape["counts"]
    return coco_mask.decode({**shape, "counts": counts.encode() if isinstance(counts, str) else counts})


def polygons(shape, image):
    """The polygons of a segmentation, those of a mask along its pixels' edges, holes left out."""
    if isinstance(shape, list):
        return shape
    return [ring.ravel().tolist() for ring in contours.trace(bitmap(shape, image)) if contours.shoelace(ring) > 0]


def box(mask):
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def pairs(polygon):
    return [list(point) for point in zip(polygon[0::2], polygon[1::2], strict=True)]


def copy_pictures(document, images, folder):
    for image in document["images"]:
        (folder / image["file_name"]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(images / image["file_name"], folder / image["file_name"])


def labelme(document, images, out):
    copy_pictures(document, images, out)
    for image, objects in by_image(document):
        shapes = []
        for number, (name, shape) in enumerate(objects):
            if isinstance(shape, dict):
                mask = bitmap(shape, image)
                left, top, right, bottom = (int(v) for v in box(mask))
                file = io.BytesIO()
                Image.fromarray(mask[top:bottom, left:right] > 0).save(file, "PNG")
                text = base64.b64encode(file.getvalue()).decode()
                points = [[left, top], [right - 1, bottom - 1]]
                shapes.append({"label": name, "points": points, "shape_type": "mask", "group_id": None, "mask": text})
            else:
                group = number if len(shape) > 1 else None
                shapes += [
                    {"label": name, "points": pairs(part), "shape_type": "polygon", "group_id": group, "flags": {}}
                    for part in shape
                ]
        content = {"version": "5.4.1", "flags": {}, "shapes": shapes, "imagePath": image["file_name"].split("/")[-1]}
        content |= {"imageData": None, "imageHeight": image["height"], "imageWidth": image["width"]}
        (out / image["file_name"]).with_suffix(".json").write_text(json.dumps(content))
    return out


def yolo(document, images, out):
    """With a data.yaml; every part of an object is a line."""
    copy_pictures(document, images, out / "images")
    ids = [category["id"] for category in document["categories"]]
    names = {category["name"]: ids.index(category["id"]) for category in document["categories"]}
    for image, objects in by_image(document):
        size = np.array([image["width"], image["height"]])
        lines = [
            " ".join([str(names[name]), *(f"{v:.9g}" for v in (np.reshape(part, (-1, 2)) / size).ravel())])
            for name, shape in objects
            for part in polygons(shape, image)
        ]
        file = (out / "labels" / image["file_name"]).with_suffix(".txt")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(lines))
    listed = "".join(f"  {number}: {name}\n" for name, number in names.items())
    (out / "data.yaml").write_text(f"path: .\ntrain: images\nval: images\nnames:\n{listed}")
    return out


def via(document, images, out):
    copy_pictures(document, images, out)
    files = {}
    for image, objects in by_image(document):
        regions = [
            {
                "shape_attributes": {"name": "polygon", "all_points_x": part[0::2], "all_points_y": part[1::2]},
                "region_attributes": {"label": name},
            }
            for name, shape in objects
            for part in polygons(shape, image)
        ]
        entry = {"filename": image["file_name"], "size": 1, "regions": regions, "file_attributes": {}}
        files[image["file_name"] + "1"] = entry
    (out / "via_project.json").write_text(json.dumps({"_via_settings": {}, "_via_img_metadata": files, "_via_attributes": {}}))
    return out


def cvat(document, images, out):
    copy_pictures(document, images, out / "images")
    labels = "".join(f"<label><name>{c['name']}</name></label>" for c in document["categories"])
    lines = [
        "<?xml version='1.0' encoding='utf-8'?><annotations><version>1.1</version>",
        f"<meta><job><labels>{labels}</labels></job></meta>",
    ]
    for image, objects in by_image(document):
        lines.append(
            '<image id="{}" name={} width="{width}" height="{height}">'.format(0, quoteattr(image["file_name"]), **image)
        )
        for number, (name, shape) in enumerate(objects, 1):
            if isinstance(shape, dict):
                mask = bitmap(shape, image)
                left, top, right, bottom = box(mask)
                flat = mask[top:bottom, left:right].ravel()
                ends = np.flatnonzero(np.diff(flat)) + 1
                runs = [0] * int(flat[0]) + np.diff([0, *ends, len(flat)]).tolist()
                place = f'left="{left}" top="{top}" width="{right - left}" height="{bottom - top}"'
                lines.append(f'<mask label={quoteattr(name)} rle="{", ".join(map(str, runs))}" {place} z_order="0"></mask>')
            for part in shape if isinstance(shape, list) else ():
                points = ";".join(f"{x},{y}" for x, y in pairs(part))
                group = f' group_id="{number}"' if len(shape) > 1 else ""
                lines.append(f'<polygon label={quoteattr(name)} occluded="0" points="{points}"{group}></polygon>')
        lines.append("</image>")
    (out / "annotations.xml").write_text("\n".join([*lines, "</annotations>"]))
    return out


def labelstudio(document, images, out):
    copy_pictures(document, images, out / "images")
    tasks = []
    for number, (image, objects) in enumerate(by_image(document), 1):
        results, size = [], {"original_width": image["width"], "original_height": image["height"], "image_rotation": 0}
        for name, shape in objects:
            if isinstance(shape, dict):
                value = {"format": "rle", "rle": brush_rle(bitmap(shape, image)), "brushlabels": [name]}
                results.append({"type": "brushlabels", "id": f"r{len(results)}", "value": value, **size})
            for part in shape if isinstance(shape, list) else ():
                points = (np.reshape(part, (-1, 2)) * 100 / [image["width"], image["height"]]).tolist()
                value = {"points": points, "closed": True, "polygonlabels": [name]}
                results.append({"type": "polygonlabels", "id": f"r{len(results)}", "value": value, **size})
        url = f"/data/upload/3/{number:08x}-{image['file_name'].split('/')[-1]}"
        tasks.append(
            {"id": number, "data": {"image": url}, "annotations": [{"id": 1, "was_cancelled": False, "result": results}]}
        )
    (out / "project-1.json").write_text(json.dumps(tasks))
    return out


def brush_rle(mask):
    """Label Studio's RLE of a mask: runs of equal values, lengths of 16 bits, one value at a time where they change."""
    values = np.repeat((mask.ravel() * 255)[:, None], 4, axis=1).ravel()
    bits = [format(len(values), "032b"), format(7, "05b"), *[format(n, "04b") for n in (2, 3, 7, 15)]]
    ends = [*(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    start = 0
    for end in ends:
        while start < end:
            run = min(end - start, 65536)
            if run % 4 == 0 and run < 9:  # values one by one
                bits.append("0" + "01" + format(run - 1, "04b") + format(int(values[start]), "08b") * run)
            else:
                bits.append("1" + "11" + format(run - 1, "016b") + format(int(values[start]), "08b"))
            start += run
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return [int(text[i : i + 8], 2) for i in range(0, len(text), 8)]


def ids(objects, image, dtype=np.uint16):
    """An instance-ID image; of objects that overlap the later one is on top."""
    array = np.zeros((image["height"], image["width"]), dtype)
    for number, (_, shape) in enumerate(objects, 1):
        array[bitmap(shape, image) > 0] = number
    return array


def masks(document, images, out, suffix=".tif"):
    """images/ and masks/, as StarDist has it; of one class."""
    copy_pictures(document, images, out / "images")
    for image, objects in by_image(document):
        file = (out / "masks" / image["file_name"]).with_suffix(suffix)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(ids(objects, image)).save(file)
    return out


def cellpose(document, images, out):
    """NAME.png and NAME_masks.png side by side."""
    copy_pictures(document, images, out)
    for image, objects in by_image(document):
        file = out / image["file_name"]
        Image.fromarray(ids(objects, image)).save(file.with_name(f"{file.stem}_masks.png"))
    return out


def bowl(document, images, out):
    """A folder for every picture, with a mask for every object."""
    for image, objects in by_image(document):
        stem = image["file_name"].rpartition(".")[0].replace("/", "_")
        home = out / stem
        for part in ("images", "masks"):
            (home / part).mkdir(parents=True)
        Image.open(images / image["file_name"]).save(home / "images" / f"{stem}.png")
        for number, (_, shape) in enumerate(objects):
            Image.fromarray(bitmap(shape, image) * 255).save(home / "masks" / f"{number}.png")
    return out


def voc(document, images, out):
    """JPEGImages/, SegmentationObject/ and SegmentationClass/ with palettes, 255 on the borders of objects."""
    copy_pictures(document, images, out / "JPEGImages")
    names = [category["name"] for category in document["categories"]]
    palette = np.random.default_rng(0).integers(1, 255, 768).tolist()
    lines = ["# label:color_rgb:parts:actions", "background:0,0,0::"]
    palette[:3] = [0, 0, 0]
    for number, name in enumerate(names, 1):
        lines.append(f"{name}:{','.join(map(str, palette[3 * number : 3 * number + 3]))}::")
    (out / "labelmap.txt").write_text("\n".join(lines))
    for image, objects in by_image(document):
        number, kind = ids(objects, image, np.uint8), np.zeros((image["height"], image["width"]), np.uint8)
        for name, shape in objects:
            kind[bitmap(shape, image) > 0] = 1 + names.index(name)
        for folder, array in (("SegmentationObject", number), ("SegmentationClass", kind)):
            file = (out / folder / image["file_name"]).with_suffix(".png")
            file.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(array, "P")
            picture.putpalette(palette)
            picture.save(file)
    return out
