// An exported PolarMask .tflite file in the browser: pixels in, polygons out, as polarmask_tf/lite.py does it in Python.
// Coordinates are continuous, x right, y down; pixel (0, 0) covers [0, 1) x [0, 1).

const clip = (value, limit) => Math.min(Math.max(value, 0), limit);
const sigmoid = (x) => 1 / (1 + Math.exp(-x));

let runtime; // LiteRT.js, loaded once, with the first model

async function loadRuntime() {
  try {
    const litert = await import("@litertjs/core"); // where that lies says the import map of index.html
    const wasm = new URL("../wasm/", import.meta.resolve("@litertjs/core"));
    await litert.loadLiteRt(String(wasm));
    return litert;
  } catch (error) {
    runtime = undefined;
    throw new Error(`LiteRT.js does not load; is node_modules beside index.html? ${error.message ?? ""}`);
  }
}

// The text of the member metadata.json of the zip at the end of a .tflite file.
export async function readMetadata(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const u16 = (at) => view.getUint16(at, true);
  const u32 = (at) => view.getUint32(at, true);
  let end = bytes.length - 22; // the end record is that long, and behind it may be a comment
  while (end >= 0 && end >= bytes.length - 22 - 65535 && u32(end) !== 0x06054b50) end--;
  if (end < 0 || u32(end) !== 0x06054b50) throw new Error("no metadata.json at its end");
  const start = end - u32(end + 12); // of the list of members
  const shift = start - u32(end + 16); // 0, unless the zip was made alone and appended then
  for (let entry = start, left = u16(end + 10); left > 0; left--) {
    const name = new TextDecoder().decode(bytes.subarray(entry + 46, entry + 46 + u16(entry + 28)));
    if (name === "metadata.json") {
      const local = u32(entry + 42) + shift;
      const begin = local + 30 + u16(local + 26) + u16(local + 28);
      const packed = new Blob([bytes.subarray(begin, begin + u32(entry + 20))]);
      const method = u16(entry + 10);
      if (method === 0) return packed.text();
      if (method !== 8) throw new Error(`metadata.json is compressed by method ${method}, not stored or deflated`);
      return new Response(packed.stream().pipeThrough(new DecompressionStream("deflate-raw"))).text();
    }
    entry += 46 + u16(entry + 28) + u16(entry + 30) + u16(entry + 32);
  }
  throw new Error("no metadata.json at its end");
}

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

function overlap(a, b, least) {
  const side = (axis) => Math.max(Math.min(a[axis + 2], b[axis + 2]) - Math.max(a[axis], b[axis]), 0);
  const common = side(0) * side(1);
  const area = ([x0, y0, x1, y1]) => (x1 - x0) * (y1 - y0);
  return common > least * (area(a) + area(b) - common);
}

// A --raw file's outputs {name: {shape, data}} to detections in pixels of its input: the network's logits by level,
// decoded, the best of each level, without those that overlap a better one of the same class.
export function assemble(heads, raw, height, width) {
  const found = [];
  for (const [level, unit] of Object.entries(raw.ray_units)) {
    const [classes, centerness, rays] = ["classes", "centerness", "rays"].map((name) => heads[`P${level}_${name}`]);
    const columns = classes.shape[2];
    const count = classes.shape[3];
    const n = rays.shape[3];
    const candidates = [];
    centerness.data.forEach((center, at) => {
      const logits = classes.data.subarray(at * count, (at + 1) * count);
      const best = logits.indexOf(logits.reduce((a, b) => Math.max(a, b)));
      for (const number of raw.multi_label ? logits.keys() : [best]) {
        const score = Math.fround(sigmoid(logits[number]) * sigmoid(center));
        if (score > Math.fround(raw.score_threshold)) candidates.push({ score, class: number, at });
      }
    });
    candidates.sort((a, b) => b.score - a.score);
    for (const { at, ...candidate } of candidates.slice(0, raw.candidates)) {
      const centerX = 2 ** level * ((at % columns) + 0.5);
      const centerY = 2 ** level * (Math.floor(at / columns) + 0.5);
      const polygon = Array.from(rays.data.subarray(at * n, (at + 1) * n), (logit, k) => {
        const reach = unit * Math.exp(Math.min(Math.max(logit, -raw.ray_limit), raw.ray_limit));
        const angle = (2 * Math.PI * k) / n;
        return [clip(centerX + reach * Math.cos(angle), width), clip(centerY + reach * Math.sin(angle), height)];
      });
      const [xs, ys] = [0, 1].map((axis) => polygon.map((point) => point[axis]));
      found.push({ ...candidate, box: [Math.min(...xs), Math.min(...ys), Math.max(...xs), Math.max(...ys)], polygon });
    }
  }
  const kept = [];
  for (const one of found.sort((a, b) => b.score - a.score)) {
    if (kept.length === raw.max_detections) break;
    if (!kept.some((other) => other.class === one.class && overlap(other.box, one.box, raw.nms_iou))) kept.push(one);
  }
  return kept;
}

// The outputs of a file with all in its graph to detections in pixels of its input, too.
function unpack(outputs, height, width) {
  const names = ["scores", "classes", "boxes", "polygons"];
  const [scores, classes, boxes, polygons] = names.map((name) => outputs[`detection_${name}`]);
  const rays = polygons.shape[2];
  return Array.from({ length: outputs.num_detections.data[0] }, (_, i) => {
    const [top, left, bottom, right] = boxes.data.subarray(i * 4, i * 4 + 4);
    const polygon = Array.from({ length: rays }, (_, k) => {
      const at = (i * rays + k) * 2;
      return [polygons.data[at] * width, polygons.data[at + 1] * height];
    });
    const box = [left * width, top * height, right * width, bottom * height];
    return { score: scores.data[i], class: classes.data[i], box, polygon };
  });
}

// const model = await PolarMask.load(bytes);  const { detections } = await model.detect(await readImage(file));
// A detection: {label, class, score, box: [xmin, ymin, xmax, ymax], polygon: [[x, y], ...]} in pixels of the image.
export class PolarMask {
  // bytes: a Uint8Array, the whole file.
  static async load(bytes) {
    const model = new PolarMask();
    let reason;
    try {
      model.metadata = JSON.parse(await readMetadata(bytes));
      const { classes, input, raw } = model.metadata;
      model.labels = classes.map((entry) => entry.name);
      [model.height, model.width, model.raw] = [input.height, input.width, raw];
      model.stretch = { letterbox: false, stretch: true }[input.resize ?? "letterbox"];
      if (model.stretch === undefined) reason = `input.resize is ${input.resize}`;
      if (![model.height, model.width].every((side) => side > 0) || model.labels.includes(undefined)) {
        reason = "its metadata.json is incomplete";
      }
    } catch (error) {
      reason = error.message;
    }
    if (reason === undefined) {
      model.litert = await (runtime ??= loadRuntime());
      try {
        model.compiled = await model.litert.loadAndCompile(bytes, { accelerator: "wasm" });
        const [{ dtype, shape }] = model.compiled.getInputDetails();
        if (dtype !== "uint8" || String(shape) !== String([1, model.height, model.width, 3])) {
          reason = `its input is ${dtype} ${shape}, not as in its metadata.json`;
        }
      } catch (error) {
        reason = error.message;
      }
    }
    if (reason !== undefined) {
      model.delete();
      throw new Error(`no .tflite file with metadata.json, or damaged; export it again: ${reason}`);
    }
    return model;
  }

  // image: an ImageData, of any size. Also gives the milliseconds of resizing, and of the rest.
  async detect(image) {
    const begin = performance.now();
    const { pixels, scaleX, scaleY } = letterbox(image, this.height, this.width, this.stretch);
    const resized = performance.now();
    const outputs = await this.run(pixels);
    const found = this.raw ? assemble(outputs, this.raw, this.height, this.width) : unpack(outputs, this.height, this.width);
    const place = ([x, y]) => [clip(x * scaleX, image.width), clip(y * scaleY, image.height)];
    const detections = found.map(({ score, class: number, box, polygon }) => ({
      label: this.labels[number], class: number, score,
      box: [...place(box.slice(0, 2)), ...place(box.slice(2))], polygon: polygon.map(place),
    }));
    return { detections, milliseconds: { resize: resized - begin, model: performance.now() - resized } };
  }

  // uint8 [height, width, 3] -> {name: {shape, data}}. LiteRT.js' memory is not collected, so it is freed here.
  async run(pixels) {
    const images = new this.litert.Tensor(pixels, [1, this.height, this.width, 3]);
    try {
      const outputs = await this.compiled.run({ images });
      const copied = {};
      for (const [name, tensor] of Object.entries(outputs)) {
        copied[name] = { shape: [...tensor.type.layout.dimensions], data: await tensor.data() };
        tensor.delete();
      }
      return copied;
    } finally {
      images.delete();
    }
  }

  delete() {
    this.compiled?.delete();
  }
}
