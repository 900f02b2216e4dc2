// Images in the browser: files decoded as they are stored, and fitted into a network's input.

// Browsers turn a photo as its EXIF data says, and cannot be told not to. Networks are trained without that, so a JPEG's EXIF
// data gets another name, under which nobody reads it.
function hideExif(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const u16 = (at) => (at + 2 <= bytes.length ? view.getUint16(at) : 0);
  if (u16(0) !== 0xffd8) return;
  for (let at = 2; u16(at) > 0xff00 && u16(at) !== 0xffda; at += 2 + u16(at + 2)) { // segments up to the scan
    if (u16(at) === 0xffe1) bytes[at + 4] = 0;
  }
}

// The decoded pixels of an image file or other blob: no EXIF rotation, no change of colors.
export async function readImage(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  hideExif(bytes);
  const options = { colorSpaceConversion: "none", premultiplyAlpha: "none" };
  const bitmap = await createImageBitmap(new Blob([bytes]), options);
  const context = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return context.getImageData(0, 0, context.canvas.width, context.canvas.height);
}

// Python's round(): halves go to the even neighbor.
const round = (x) => (Math.abs(x % 1) === 0.5 ? 2 * Math.round(x / 2) : Math.round(x));

// For every one of `size` pixels, the first of `from` pixels it is made of, and their weights, in units of 2^-22.
function weights(from, size) {
  const scale = from / size;
  const support = Math.max(scale, 1);
  return Array.from({ length: size }, (_, pixel) => {
    const center = (pixel + 0.5) * scale;
    const first = Math.trunc(Math.max(center - support + 0.5, 0));
    const last = Math.trunc(Math.min(center + support + 0.5, from));
    const triangle = Array.from({ length: last - first }, (_, k) =>
      Math.max(1 - Math.abs((k + first - center + 0.5) / support), 0));
    const sum = triangle.reduce((a, b) => a + b);
    return { first, parts: Int32Array.from(triangle, (part) => Math.trunc(0.5 + (part / sum) * 2 ** 22)) };
  });
}

// An ImageData fitted into uint8 RGB [height, width, 3]: resized, its ratio kept, or lost if `stretch`, top left in zeros.
// Own resizing, since browsers' canvases differ from each other, and some skip pixels. This is Pillow's BILINEAR: the same
// integers where it, too, makes the columns first, which depends on its version and on the sizes, else at most one level off.
export function letterbox(image, height, width, stretch = false) {
  const scale = Math.min(height / image.height, width / image.width);
  const fit = (side) => Math.max(1, round(side * scale));
  const filled = stretch ? { width, height } : { width: fit(image.width), height: fit(image.height) };
  const rows = new Uint8Array(image.height * filled.width * 3); // the columns made, the rows still as they were
  const columns = weights(image.width, filled.width);
  const { data } = image;
  for (let y = 0, to = 0; y < image.height; y++) {
    for (const { first, parts } of columns) {
      for (let color = 0; color < 3; color++) {
        let sum = 2 ** 21;
        const at = (y * image.width + first) * 4 + color;
        for (let k = 0; k < parts.length; k++) sum += parts[k] * data[at + 4 * k];
        rows[to++] = sum >> 22;
      }
    }
  }
  const pixels = new Uint8Array(height * width * 3);
  const row = filled.width * 3;
  weights(image.height, filled.height).forEach(({ first, parts }, y) => {
    for (let x = 0; x < row; x++) {
      let sum = 2 ** 21;
      for (let k = 0; k < parts.length; k++) sum += parts[k] * rows[(first + k) * row + x];
      pixels[y * width * 3 + x] = sum >> 22;
    }
  });
  return { pixels, scaleX: image.width / filled.width, scaleY: image.height / filled.height };
}
