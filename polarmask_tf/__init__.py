"""PolarMask (CVPR 2020) for TensorFlow: instance segmentation as polygons, from COCO JSON to one .tflite file."""

__version__ = "0.1.0"
