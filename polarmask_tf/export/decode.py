"""Encoded images of any kind and size to one batch for the network, inside the graph that TF Serving runs.

What a stranger sends is looked at before it is decoded: kind and size are read from the header, so that an image of a few
bytes that would fill the memory is refused without being unpacked.
"""

from __future__ import annotations

import tensorflow as tf

KINDS = "JPEG, PNG, GIF, BMP or WebP"
MAX_SCANS = 100  # of a JPEG; encoders make about ten, and each costs the decoder a pass over all pixels
MAX_GIF_EXTENSIONS = 50  # before a GIF's first frame
MAX_GIF_RUNS, MAX_GIF_RUN = 100, 1 << 20  # of equally long blocks in one of its parts, and bytes of such a run


def place_batch(contents: tf.Tensor, place, max_pixels: int, examples: bool = False):
    """Decodes and places a batch of encoded images, one after the other.

    Args:
      contents: string [B].
      place: uint8 [h, w, 3] -> (uint8 [H, W, 3], float32 [2]): how an image meets the network, and the height and width of
        that canvas that it then fills.
      max_pixels: an image of more is refused by its header.
      examples: each of `contents` is a serialized tf.train.Example with an image under image/encoded.

    Returns:
      uint8 [B, H, W, 3]; float32 [B, 2], heights and widths filled; float32 [B, 2], heights and widths of the images.
      Canvases that differ in size are padded with zeros to the largest. If an image is refused the batch fails, with
      InvalidArgumentError: "image 2 of the batch (the first is 0): ..." and the reason.
    """

    def one(row, content):
        if examples:
            key = "image/encoded"
            content = tf.io.parse_single_example(content, {key: tf.io.FixedLenFeature([], tf.string, default_value="")})[key]
        content, problem = examine(content, max_pixels)
        pixels = tf.cond(tf.equal(problem, ""), lambda: decode(content), lambda: tf.zeros([1, 1, 3], tf.uint8))
        return row, problem, *place(pixels), tf.cast(tf.shape(pixels)[:2], tf.float32)

    count = tf.size(contents)
    images = tf.data.Dataset.from_tensor_slices((tf.range(count), contents)).map(one)
    canvas = [side or 32 for side in images.element_spec[2].shape]
    # A decoder's own error would not say which image it was: what fails is left out here, and missed below. (Run as a
    # dataset, TensorFlow's decoders also free their memory after a failure.) One more element makes a batch of no images.
    last = tf.data.Dataset.from_tensors((count, "", tf.zeros(canvas, tf.uint8), tf.zeros([2]), tf.zeros([2])))
    images = images.ignore_errors().concatenate(last).padded_batch(tf.cast(count, tf.int64) + 1)
    rows, problems, *placed = (part[:-1] for part in images.get_single_element())
    missed = tf.fill([count], "cannot be decoded: damaged, cut off, or of a variety that TensorFlow does not read")
    problems = tf.concat([tf.tensor_scatter_nd_update(missed, rows[:, tf.newaxis], problems), [""]], axis=0)
    refused = tf.not_equal(problems, "")
    first = tf.argmax(refused)
    number = tf.strings.as_string(first)
    message = tf.strings.join(["image ", number, " of the batch (the first is 0): ", problems[first]])
    with tf.control_dependencies([tf.debugging.Assert(~tf.reduce_any(refused), [message])]):
        return [tf.identity(part) for part in placed]


def decode(content: tf.Tensor) -> tf.Tensor:
    """What `examine` let through, string [], to uint8 [h, w, 3] RGB.

    As decoded: no EXIF rotation, alpha dropped, of 16 bits a channel the high 8. Raises InvalidArgumentError.
    """
    pixels = tf.switch_case(
        _kind(_header(content)),
        [
            # As Pillow decodes it, and with it `polarmask predict`; TensorFlow's default is coarser.
            lambda: tf.io.decode_jpeg(content, channels=3, dct_method="INTEGER_ACCURATE"),
            lambda: tf.io.decode_png(content, channels=3),
            lambda: tf.io.decode_gif(content)[0],
            lambda: tf.io.decode_bmp(content)[..., :3],
            lambda: tf.io.decode_webp(content)[0, ..., :3],
        ],
    )
    return tf.ensure_shape(pixels, [None, None, 3])


def examine(content: tf.Tensor, max_pixels: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Looks at an encoded image, string [], without decoding it.

    Returns what is to be decoded (the content; of a GIF its first frame alone), and why it is not to be, or "". Of a
    damaged file it may say neither: the decoder will. May raise InvalidArgumentError for one, too.
    """
    header = _header(content)

    def jpeg():
        # By libjpeg itself, which is not fooled by the thumbnails that metadata holds.
        height, width, _ = tf.unstack(tf.io.extract_jpeg_shape(content, tf.int64))
        return content, width, height, _jpeg_problem(content)

    def png():
        return content, _number(header, 16, 4, big=True), _number(header, 20, 4, big=True), ""

    def gif():
        frame, width, height, problem = _first_frame(content)
        # The canvas may be small and the frame large, or the other way round: libgif allocates both.
        return frame, tf.maximum(width, _number(header, 6, 2)), tf.maximum(height, _number(header, 8, 2)), problem

    def bmp():
        height = tf.bitcast(tf.cast(_number(header, 22, 4), tf.uint32), tf.int32)  # negative: rows from top to bottom
        plain = _number(header, 14, 4) >= 40  # else the header is an older one, of other fields
        plain &= tf.reduce_any(_number(header, 28, 2) == [24, 32]) & (_number(header, 30, 4) == 0)
        problem = tf.where(plain, "", "a BMP with a palette, compressed or of an old kind; 24 or 32 plain bits are read")
        return content, _number(header, 18, 4), tf.abs(tf.cast(height, tf.int64)), problem

    def webp():
        lossless, extended = _starts(header, 12, b"VP8L"), _starts(header, 12, b"VP8X")
        packed = _number(header, 21, 4)
        sizes = tf.case(
            [
                (extended, lambda: (_number(header, 24, 3) + 1, _number(header, 27, 3) + 1)),
                (lossless, lambda: (packed % 2**14 + 1, packed // 2**14 % 2**14 + 1)),
            ],
            default=lambda: (_number(header, 26, 2) % 2**14, _number(header, 28, 2) % 2**14),
        )
        # TensorFlow 2.20 writes past its memory when it decodes an animated WebP.
        animated = extended & (header[20] // 2 % 2 == 1)
        return content, *sizes, tf.where(animated, "an animated WebP, which TensorFlow cannot decode", "")

    def other():
        empty = tf.equal(tf.strings.length(content), 0)
        problem = tf.where(empty, "no data", f"not an image; {KINDS} is expected")
        return content, tf.constant(1, tf.int64), tf.constant(1, tf.int64), problem

    content, width, height, problem = tf.switch_case(_kind(header), [jpeg, png, gif, bmp, webp, other])
    pixels = tf.cast(width, tf.float64) * tf.cast(height, tf.float64)  # of a forged header: more than int64 holds
    limit = f"pixels (width x height), the limit set at export is {max_pixels}"
    too_many = tf.strings.format(f"{{}} x {{}} {limit}", (width, height))
    for wrong, why in ((pixels > max_pixels, too_many), (tf.equal(pixels, 0), "an image without pixels")):
        problem = tf.where(tf.equal(problem, "") & wrong, why, problem)
    return content, problem


def _header(content):
    """The first 64 bytes, int64 [64]; zeros where there are fewer."""
    padded = tf.strings.join([tf.strings.substr(content, 0, 64), "\0" * 64])
    return tf.cast(tf.io.decode_raw(tf.strings.substr(padded, 0, 64), tf.uint8), tf.int64)


def _starts(header, at: int, text: bytes):
    return tf.reduce_all(tf.equal(header[at : at + len(text)], list(text)))


def _number(data, at, length: int, big: bool = False):
    """The unsigned integer of `length` bytes at data[at], int64 []."""
    weights = [256**i for i in range(length)]
    return tf.reduce_sum(data[at : at + length] * tf.constant(weights[::-1] if big else weights, data.dtype))


def _kind(header):
    """0 JPEG, 1 PNG, 2 GIF, 3 BMP, 4 WebP, 5 anything else; by the same bytes as TensorFlow's decoders."""
    kinds = [_starts(header, 0, text) for text in (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM")]
    kinds += [_starts(header, 0, b"RIFF") & _starts(header, 8, b"WEBP"), tf.constant(True)]
    return tf.argmax(tf.stack(kinds), output_type=tf.int32)


def _jpeg_problem(content):
    """More scans than any encoder makes: a small file that keeps the decoder busy for minutes."""
    data = tf.io.decode_raw(content, tf.uint8)
    # A scan's header: the marker FF DA, its length in two bytes, which is 6 + 2 n, and n components.
    scans = (data[:-4] == 0xFF) & (data[1:-3] == 0xDA) & (data[2:-2] == 0) & (data[3:-1] == 2 * data[4:] + 6)
    scans = tf.math.count_nonzero(scans)
    return tf.where(scans > MAX_SCANS, tf.strings.format("a JPEG of {} scans", scans), "")


def _first_frame(content):
    """A GIF, cut off after its first frame (the decoder would unpack all), that frame's width and height, and a problem.

    The format (GIF89a) has chains of blocks, each with its length before it; an empty one ends a chain. A chain is the data
    of an extension or of a frame.
    """
    # Zeros past the end, where every chain ends; the decoder then complains.
    data = tf.cast(tf.io.decode_raw(tf.strings.join([content, "\0" * 16]), tf.uint8), tf.int32)
    last = tf.size(data) - 1

    def end(at):  # of the chain whose first block's length is data[at]
        def run(at):  # of blocks of one length, as encoders write them
            step = data[at] + 1
            others = tf.concat([data[at : at + MAX_GIF_RUN : step] != data[at], [True]], axis=0)
            return [tf.minimum(at + step * tf.argmax(others, output_type=tf.int32), last)]

        return tf.while_loop(lambda at: data[at] != 0, run, [tf.minimum(at, last)], maximum_iterations=MAX_GIF_RUNS)[0]

    def table(flags):  # bytes of a color table
        return tf.where(flags >= 128, 3 * 2 ** (flags % 8 + 1), 0)

    (frame,) = tf.while_loop(
        lambda at: data[at] == 0x21,
        lambda at: [tf.minimum(end(at + 2) + 1, last)],
        [tf.minimum(13 + table(data[10]), last)],
        maximum_iterations=MAX_GIF_EXTENSIONS,
    )
    found = data[frame] == 0x2C
    frame = tf.minimum(frame, last - 12)
    stop = end(frame + 11 + table(data[frame + 9]))
    problem = tf.where(found & (data[stop] == 0), "", "a GIF whose first frame cannot be found")
    sides = (tf.cast(_number(data, frame + at, 2), tf.int64) for at in (5, 7))
    return tf.strings.join([tf.strings.substr(content, 0, stop + 1), ";"]), *sides, problem
