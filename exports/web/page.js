// The page: files in by drop or choice, polygons out on the canvas and as JSON.
import { PolarMask, readImage } from "./polarmask.js";

const RUNS = 5; // that the shown milliseconds are the median of
const PATIENCE = 3000; // ms: a slow model runs less often

const $ = (id) => document.getElementById(id);
const median = (values) => [...values].sort((a, b) => a - b)[values.length >> 1];
const pause = () => new Promise((resolve) => setTimeout(resolve)); // lets the browser draw

const parameters = new URLSearchParams(location.search); // model=URL, accelerator=gpu or cpu

let model; // {name, network}
let picture; // {name, data}: data an ImageData
let detections = [];
let least; // the slider's score, once it was moved; before, each class has its own

const worthShowing = ({ score, class: number }) => score >= (least ?? model.network.thresholds.classes[number]);

function draw() {
  if (!picture) return;
  const { width, height } = picture.data;
  const scale = Math.min(900 / width, 700 / height); // small images are enlarged, so that lines and text stay fine
  const canvas = $("canvas");
  [canvas.width, canvas.height] = [Math.ceil(width * scale), Math.ceil(height * scale)];
  const context = canvas.getContext("2d");
  const still = new OffscreenCanvas(width, height);
  still.getContext("2d").putImageData(picture.data, 0, 0);
  context.drawImage(still, 0, 0, canvas.width, canvas.height);
  context.lineWidth = 2;
  context.font = "bold 14px system-ui, sans-serif";
  context.textBaseline = "top";
  const shown = detections.filter(worthShowing).reverse(); // the best on top
  const color = (number, alpha) => `hsl(${(number * 137.5) % 360} 90% 35% / ${alpha})`; // neighbors far apart
  for (const { class: number, polygon } of shown) {
    context.beginPath();
    for (const [x, y] of polygon) context.lineTo(x * scale, y * scale);
    context.closePath();
    context.fillStyle = color(number, 0.3);
    context.fill();
    context.strokeStyle = color(number, 1);
    context.stroke();
  }
  for (const { label, class: number, score, box } of shown) {
    const text = `${label} ${score.toFixed(2)}`;
    const wide = context.measureText(text).width + 8;
    const x = Math.max(Math.min(box[0] * scale, canvas.width - wide), 0);
    const y = Math.max(box[1] * scale - 18, 0);
    context.fillStyle = color(number, 1);
    context.fillRect(x, y, wide, 18);
    context.fillStyle = "#fff";
    context.fillText(text, x + 4, y + 2);
  }
}

async function detect() {
  if (!model) throw new Error("no model yet: drop an exported .tflite file");
  if (!picture) await useSample();
  const times = [];
  const begin = performance.now();
  let found;
  do { // the first run, which also sets things up, does not count
    found = await model.network.detect(picture.data);
    times.push(found.milliseconds);
    await pause();
  } while (times.length <= RUNS && performance.now() - begin < PATIENCE);
  detections = found.detections;
  const counted = times.length > 1 ? times.slice(1) : times;
  const milliseconds = {
    resize: median(counted.map((time) => time.resize)), model: median(counted.map((time) => time.model)), runs: counted.length,
  };
  draw();
  const { accelerator, reason } = model.network;
  $("where").textContent = {
    CPU: `Runs on the CPU (WebAssembly): ${reason}.`,
    GPU: "Runs on the GPU (WebGPU).",
    "GPU and CPU": "Runs on the GPU (WebGPU); what that lacks, like NMS, on the CPU.",
  }[accelerator];
  const { width, height } = picture.data;
  const { resize, model: rest, runs } = milliseconds;
  $("status").textContent =
    `${picture.name} (${width} x ${height}), ${model.name}: ${rest.toFixed(1)} ms from pixels to polygons, ` +
    `${resize.toFixed(1)} ms to resize (median of ${runs})`;
  const all = { model: model.name, accelerator, image: picture.name, width, height, milliseconds, detections };
  $("json").textContent = JSON.stringify(all, null, 1);
}

async function useModel(name, bytes) {
  const network = await PolarMask.load(bytes, parameters.get("accelerator")).catch((error) => {
    throw new Error(`${name}: ${error.message}`);
  });
  model?.network.delete();
  model = { name, network };
  detections = []; // of another model
  least = undefined;
  $("least").value = network.thresholds.overall;
  const own = network.metadata.thresholds ? ", the model's own" : "";
  $("shown").textContent = network.thresholds.overall.toFixed(2) + own;
}

async function useImage(name, blob) {
  const data = await readImage(blob).catch((error) => {
    throw new Error(`${name}: cannot read the image: ${error.message}`);
  });
  picture = { name, data };
  detections = [];
}

async function useFiles(files) {
  for (const file of files) {
    if (/\.tflite$/i.test(file.name)) await useModel(file.name, new Uint8Array(await file.arrayBuffer()));
    else await useImage(file.name, file);
  }
  await detect();
}

async function fetched(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url}: ${response.status} ${response.statusText}`);
  return response;
}

async function useSample() {
  await useImage("sample.jpg", await (await fetched("sample.jpg")).blob());
}

async function begin() {
  const url = parameters.get("model") ?? "model.tflite";
  const response = await fetched(url).catch((error) => {
    throw new Error(`No model beside this page (${error.message}): drop an exported .tflite file`);
  });
  await useModel(url, new Uint8Array(await response.arrayBuffer()));
  await detect();
}

let queue = Promise.resolve();
let waiting = 0;

// One after the other; whatever goes wrong is said on the page, and what was there before stays.
function enqueue(job) {
  waiting++;
  document.body.ariaBusy = "true";
  queue = queue.then(async () => {
    $("message").textContent = "";
    await pause();
    await job().catch((error) => ($("message").textContent = error.message));
    if (--waiting === 0) document.body.ariaBusy = "false";
  });
}

for (const type of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(type, (event) => {
    event.preventDefault();
    document.body.classList.toggle("over", type === "dragover");
  });
}
document.addEventListener("drop", (event) => {
  const files = [...event.dataTransfer.files]; // gone once the event is over
  if (files.length) enqueue(() => useFiles(files));
});
for (const id of ["image", "model"]) {
  $(id).addEventListener("change", ({ target }) => {
    const files = [...target.files];
    target.value = ""; // so that the same file can be chosen again
    enqueue(() => useFiles(files));
  });
}
$("sample").addEventListener("click", () => enqueue(() => useSample().then(detect)));
$("least").addEventListener("input", () => {
  least = Number($("least").value);
  $("shown").textContent = least.toFixed(2);
  draw();
});
enqueue(begin);
