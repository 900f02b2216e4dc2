"""Formats of annotations, one module each; `recognise` tells which one a file or folder has, and reads it."""

FORMATS = ("coco", "labelme", "yolo", "via", "cvat", "labelstudio", "masks")
