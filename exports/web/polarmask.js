// An exported PolarMask .tflite file in the browser: pixels in, polygons out, as polarmask_tf/lite.py does it in Python.
// Coordinates are continuous, x right, y down; pixel (0, 0) covers [0, 1) x [0, 1).
import { letterbox, readImage } from "./pixels.js";

export { letterbox, readImage };

const SHOWN = 0.3; // least score of what is worth showing, of a model that does not say it
const clip = (value, limit) => Math.min(Math.max(value, 0), limit);
const sigmoid = (x) => 1 / (1 + Math.exp(-x));

let runtime; // {litert: LiteRT.js, lacks: why not to use the GPU, soft: if only since it is slow}, loaded once

async function loadRuntime() {
  try {
    const litert = await import("@litertjs/core"); // where that lies says the import map of index.html
    const wasm = new URL("../wasm/", import.meta.resolve("@litertjs/core"));
    const adapter = await navigator.gpu?.requestAdapter({ powerPreference: "high-performance" }).catch(() => null);
    // LiteRT.js runs what WebGPU does not have, like NMS, on the CPU meanwhile, if WebAssembly can wait for the GPU (JSPI).
    const jspi = Boolean(adapter) && "Suspending" in WebAssembly;
    await litert.loadLiteRt(String(wasm), { jspi });
    if (!navigator.gpu) return { litert, lacks: "this browser has no WebGPU (which is there on https and localhost alone)" };
    if (!adapter || !litert.getWebGpuDevice()) return { litert, lacks: "WebGPU finds no GPU here" };
    const soft = Boolean(adapter.info?.isFallbackAdapter);
    return { litert, soft, lacks: soft ? "WebGPU is software here, which is slower" : undefined };
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

function overlap(a, b, least) {
  const side = (axis) => Math.max(Math.min(a[axis + 2], b[axis + 2]) - Math.max(a[axis], b[axis]), 0);
  const common = side(0) * side(1);
  const area = ([x0, y0, x1, y1]) => (x1 - x0) * (y1 - y0);
  return common > least * (area(a) + area(b) - common);
}

// Polygon and box of rays from (x, y) that point the `ways` [[x, y], ...], cut at the image's border.
function outline({ x, y, reach, ...candidate }, ways, height, width) {
  const polygon = ways.map(([wayX, wayY], k) => [clip(x + reach[k] * wayX, width), clip(y + reach[k] * wayY, height)]);
  const [xs, ys] = [0, 1].map((axis) => polygon.map((point) => point[axis]));
  return { ...candidate, box: [Math.min(...xs), Math.min(...ys), Math.max(...xs), Math.max(...ys)], polygon };
}

// How far a ray of one candidate reaches in the polygon of another: Newton's method from the length in its own. Where the ray
// meets the line of that side of the other polygon which its end lies towards; where it meets none ahead, it stays.
function lengthIn(other, one, [wayX, wayY], length, ways) {
  const [shiftX, shiftY, n] = [one.x - other.x, one.y - other.y, ways.length];
  const end = (k) => [other.reach[k] * ways[k][0], other.reach[k] * ways[k][1]];
  for (let step = 0; step < 2; step++) {
    const angle = Math.atan2(shiftY + length * wayY, shiftX + length * wayX);
    const first = (Math.floor((angle * n) / (2 * Math.PI)) + n) % n || 0; // of NaN 0
    const [start, next] = [end(first), end((first + 1) % n)];
    const [alongX, alongY] = [next[0] - start[0], next[1] - start[1]];
    const across = wayX * alongY - wayY * alongX;
    const meets = ((start[0] - shiftX) * alongY - (start[1] - shiftY) * alongX) / (Math.abs(across) > 1e-6 ? across : 1e-6);
    if (meets > length / 2 && meets < 2 * length) length = meets;
  }
  return length;
}

// Rays of a candidate, averaged by score with those of the four best of all, best first, whose boxes overlap its own more.
function vote(one, all, iou, ways) {
  const voters = [];
  for (const other of all) {
    if (other.class === one.class && overlap(other.box, one.box, iou)) voters.push(other);
    if (voters.length === 4) break;
  }
  const sum = Math.max(voters.reduce((total, voter) => total + voter.score, 0), 1e-12);
  const weights = voters.map((voter) => voter.score / sum);
  const rest = weights.reduce((left, weight) => left - weight, 1);
  return one.reach.map((length, k) =>
    voters.reduce((total, voter, i) => total + weights[i] * lengthIn(voter, one, ways[k], length, ways), rest * length));
}

// A --raw file's outputs {name: {shape, data}} to detections in pixels of its input: the network's logits by level,
// decoded, the best of each level, without those that overlap a better one of the same class.
export function assemble(heads, raw, height, width) {
  const { temperature = 1, score_bias: bias = 0, voting_iou: votingIou = 0 } = raw; // of calibrated scores
  const calibrated = (score) => {
    if (temperature === 1 && bias === 0) return score;
    const inside = Math.min(Math.max(score, 1e-6), 1 - 1e-6);
    return Math.fround(sigmoid(Math.log(inside / (1 - inside)) / temperature + bias));
  };
  const least = Math.fround(raw.score_threshold);
  const found = [];
  let ways;
  for (const [level, unit] of Object.entries(raw.ray_units)) {
    const [classes, centerness, rays] = ["classes", "centerness", "rays"].map((name) => heads[`P${level}_${name}`]);
    const columns = classes.shape[2];
    const count = classes.shape[3];
    const n = rays.shape[3];
    ways ??= Array.from({ length: n }, (_, k) => [Math.cos((2 * Math.PI * k) / n), Math.sin((2 * Math.PI * k) / n)]);
    let candidates = [];
    centerness.data.forEach((center, at) => {
      const logits = classes.data.subarray(at * count, (at + 1) * count);
      const best = logits.indexOf(logits.reduce((a, b) => Math.max(a, b)));
      for (const number of raw.multi_label ? logits.keys() : [best]) {
        const score = Math.fround(sigmoid(logits[number]) * sigmoid(center));
        if (score > least || (votingIou > 0 && score >= 0)) candidates.push({ score, class: number, at }); // all may vote
      }
    });
    if (candidates.length > raw.candidates) { // numbers are sorted faster than objects
      const last = Float32Array.from(candidates, ({ score }) => score).sort().at(-raw.candidates);
      candidates = candidates.filter(({ score }) => score >= last);
    }
    candidates.sort((a, b) => b.score - a.score);
    for (const { at, ...candidate } of candidates.slice(0, raw.candidates)) {
      const x = 2 ** level * ((at % columns) + 0.5);
      const y = 2 ** level * (Math.floor(at / columns) + 0.5);
      const reach = Array.from(rays.data.subarray(at * n, (at + 1) * n), (logit) =>
        unit * Math.exp(Math.min(Math.max(logit, -raw.ray_limit), raw.ray_limit)));
      found.push({ x, y, reach, ...outline({ ...candidate, x, y, reach }, ways, height, width) });
    }
  }
  const kept = [];
  for (const one of found.sort((a, b) => b.score - a.score)) {
    if (kept.length === raw.max_detections || !(one.score > least)) break;
    if (!kept.some((other) => other.class === one.class && overlap(other.box, one.box, raw.nms_iou))) kept.push(one);
  }
  return kept.map((one) => {
    const reach = votingIou > 0 ? vote(one, found, votingIou, ways) : one.reach;
    return { ...outline({ ...one, reach }, ways, height, width), score: calibrated(one.score) };
  });
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

// Whether two lists hold the same detections, but for what another order of summing, or of rounding to 8 bits, makes of it.
function agree(found, expected, height, width) {
  const near = (one, other) =>
    one.class === other.class && Math.abs(one.score - other.score) < 0.02 &&
    one.polygon.every(([x, y], k) =>
      Math.abs(x - other.polygon[k][0]) < 0.02 * width && Math.abs(y - other.polygon[k][1]) < 0.02 * height);
  const count = expected.filter((one) => found.some((other) => near(one, other))).length;
  return count >= 0.9 * Math.max(found.length, expected.length);
}

// const model = await PolarMask.load(bytes);  const { detections } = await model.detect(await readImage(file));
// A detection: {label, class, score, box: [xmin, ymin, xmax, ymax], polygon: [[x, y], ...]} in pixels of the image.
// model.thresholds: from which score a detection is worth showing, {overall, classes: [of each class]}, as `evaluate` found.
export class PolarMask {
  // bytes: a Uint8Array, the whole file. accelerator: "gpu" or "cpu"; otherwise the GPU where there is a real one. What runs is
  // in model.accelerator, and why it is not the GPU in model.reason. detect may change both, see `find`.
  static async load(bytes, accelerator) {
    if (![null, undefined, "gpu", "cpu"].includes(accelerator)) throw new Error(`accelerator is ${accelerator}: gpu or cpu`);
    const model = new PolarMask();
    let reason;
    try {
      model.metadata = JSON.parse(await readMetadata(bytes));
      const { classes, input, raw, thresholds } = model.metadata;
      model.labels = classes.map((entry) => entry.name);
      model.thresholds = thresholds ?? { overall: SHOWN, classes: model.labels.map(() => SHOWN) };
      [model.height, model.width, model.raw] = [input.height, input.width, raw];
      model.stretch = { letterbox: false, stretch: true }[input.resize ?? "letterbox"];
      if (model.stretch === undefined) reason = `input.resize is ${input.resize}`;
      const scores = [model.thresholds.overall, ...model.thresholds.classes];
      if (![model.height, model.width].every((side) => side > 0) || model.labels.includes(undefined) ||
        scores.length !== model.labels.length + 1 || !scores.every(Number.isFinite)) {
        reason = "its metadata.json is incomplete";
      }
      const { voting_iou: voting = 0 } = raw ?? {};
      if (!(typeof voting === "number" && voting >= 0 && voting <= 1)) reason = "raw.voting_iou is not of 0 to 1";
    } catch (error) {
      reason = error.message;
    }
    if (reason === undefined) {
      const { litert, lacks, soft } = await (runtime ??= loadRuntime());
      model.litert = litert;
      try {
        model.cpu = await litert.loadAndCompile(bytes, { accelerator: "wasm" });
        const [{ dtype, shape }] = model.cpu.getInputDetails();
        if (dtype !== "uint8" || String(shape) !== String([1, model.height, model.width, 3])) {
          reason = `its input is ${dtype} ${shape}, not as in its metadata.json`;
        }
      } catch (error) {
        reason = error.message;
      }
      if (accelerator === "cpu") model.reason = "as asked for";
      else if (lacks && !(soft && accelerator === "gpu")) model.reason = lacks;
      else if (model.metadata?.cpu_only) model.reason = "on a GPU its box branch gives other polygons";
      else if (reason === undefined) await model.useGpu(bytes);
    }
    if (reason !== undefined) {
      model.delete();
      throw new Error(`no .tflite file with metadata.json, or damaged; export it again: ${reason}`);
    }
    return model;
  }

  async useGpu(bytes) {
    try { // in float32, as the CPU: where a GPU has float16, LiteRT.js would take that
      this.gpu = await this.litert.loadAndCompile(bytes, { accelerator: "webgpu", gpuOptions: { precision: "fp32" } });
    } catch (error) {
      return this.leaveGpu(`WebGPU does not take this file: ${error.message}`);
    }
    if (this.gpu.options.accelerator !== "webgpu") {
      this.leaveGpu("this browser cannot run a part of a file on the CPU (it lacks JSPI); a --raw file is wholly for the GPU");
    }
  }

  leaveGpu(reason) {
    const { gpu } = this;
    [this.gpu, this.reason] = [undefined, reason];
    gpu?.delete();
  }

  // "GPU", "GPU and CPU" (what WebGPU does not have, like NMS) or "CPU".
  get accelerator() {
    if (!this.gpu) return "CPU";
    return this.gpu.isFullyAccelerated ? "GPU" : "GPU and CPU";
  }

  // image: an ImageData, of any size. Also gives the milliseconds of resizing, and of the rest.
  async detect(image) {
    const begin = performance.now();
    const { pixels, scaleX, scaleY } = letterbox(image, this.height, this.width, this.stretch);
    const resize = performance.now() - begin;
    const { found, milliseconds } = await this.find(pixels);
    const place = ([x, y]) => [clip(x * scaleX, image.width), clip(y * scaleY, image.height)];
    const detections = found.map(({ score, class: number, box, polygon }) => ({
      label: this.labels[number], class: number, score,
      box: [...place(box.slice(0, 2)), ...place(box.slice(2))], polygon: polygon.map(place),
    }));
    return { detections, milliseconds: { resize, model: milliseconds } };
  }

  // uint8 [height, width, 3] -> detections in pixels of it. The first image with any is run on the CPU, too: a GPU that finds
  // others, or fails, now or later, is left for good.
  async find(pixels) {
    if (this.gpu) {
      try {
        const result = await this.run(this.gpu, pixels);
        if (this.checked) return result;
        const expected = await this.run(this.cpu, pixels);
        if (agree(result.found, expected.found, this.height, this.width)) {
          this.checked = expected.found.length > 0;
          return result;
        }
        this.leaveGpu("the GPU's detections were not the CPU's");
      } catch (error) {
        this.leaveGpu(`the GPU failed: ${error.message}`);
      }
    }
    return this.run(this.cpu, pixels);
  }

  // LiteRT.js' memory is not collected, so it is freed here.
  async run(compiled, pixels) {
    const begin = performance.now();
    const images = new this.litert.Tensor(pixels, [1, this.height, this.width, 3]);
    try {
      const outputs = {};
      for (const [name, tensor] of Object.entries(await compiled.run({ images }))) {
        outputs[name] = { shape: [...tensor.type.layout.dimensions], data: await tensor.data() };
        tensor.delete();
      }
      const found = this.raw ? assemble(outputs, this.raw, this.height, this.width) : unpack(outputs, this.height, this.width);
      return { found, milliseconds: performance.now() - begin };
    } finally {
      images.delete();
    }
  }

  delete() {
    this.cpu?.delete();
    this.gpu?.delete();
  }
}
