// Samples /bundle/ with its run table and with 50 Euler steps of the original, and shows both.

import { normal, sample, shapeOf } from "/examples/steps.mjs";
import * as ort from "/ort/ort.wasm.min.mjs";

const IMAGES = 8;
const STEPS = 50; // of the original
const byId = (id) => document.getElementById(id);
const json = async (path) => (await fetch(path)).json();

/** The original's run: every step computed, Euler's method on the model's velocity. */
const euler = (steps) => ({
  guidance: 1,
  rows: Array.from({ length: steps }, (_, i) => ({
    t: 1000 * (1 - i / steps), outputs: [-1 / steps], state: 1, noise: 0, weights: [], scale: 1, shift: 0,
  })),
});

/** Draw images [B, C, H, W] of pixels from -1 to 1; C is 1 or 3. */
function draw(canvases, x, channels, height, width) {
  const plane = height * width;
  canvases.forEach((canvas, b) => {
    const picture = new ImageData(width, height);
    for (let i = 0; i < plane; i++) {
      for (let c = 0; c < 3; c++) {
        picture.data[4 * i + c] = 127.5 * (1 + x[(b * channels + (c % channels)) * plane + i]);
      }
      picture.data[4 * i + 3] = 255;
    }
    canvas.getContext("2d").putImageData(picture, 0, 0);
  });
}

/** One column: its canvases and its strip of steps, empty. */
function column(id, title, rows, height, width) {
  const section = byId(id);
  section.querySelector("h2").textContent = title;
  const canvases = Array.from({ length: IMAGES }, () => Object.assign(document.createElement("canvas"), { height, width }));
  section.querySelector(".images").replaceChildren(...canvases);
  const marks = rows.map(() => document.createElement("i"));
  section.querySelector(".steps").replaceChildren(...marks);
  return { canvases, marks, clock: section.querySelector(".clock") };
}

async function show(id, title, run, settings, height, width) {
  const { canvases, marks, clock } = column(id, title, run.rows, height, width);
  let computing = 0; // milliseconds of the steps, without drawing
  let done = 0;
  let since = performance.now();
  const onStep = async (row, x) => {
    computing += performance.now() - since;
    marks[done++].className = row.weights.length ? "skipped" : "computed";
    clock.textContent = `${(computing / 1000).toFixed(2)} s`;
    draw(canvases, x, settings.config.in_channels, height, width);
    await new Promise(requestAnimationFrame); // lets the browser draw
    since = performance.now();
  };
  const images = await sample({ ...settings, run, onStep });
  return { images: Array.from(images), seconds: computing / 1000 };
}

async function start(settings, table) {
  byId("start").disabled = true;
  const { config } = settings;
  const [height, width] = shapeOf(config);
  const noise = normal(IMAGES * config.in_channels * height * width, 7);
  const labels = Array.from({ length: IMAGES }, (_, i) => i % config.num_classes);
  const given = { ...settings, noise, labels, guidance: 1 };
  const computed = table.rows.filter((row) => row.weights.length === 0).length;
  byId("status").textContent = "Sampling…";
  const original = await show("original", `Original, ${STEPS} steps`, euler(STEPS), given, height, width);
  const title = `Converted, ${computed} of ${table.rows.length} steps computed`;
  const converted = await show("converted", title, table, given, height, width);
  byId("status").textContent = `${(original.seconds / converted.seconds).toFixed(2)} times faster.`;
  byId("start").disabled = false;
  window.result = { noise: Array.from(noise), labels, original, converted };
}

try {
  ort.env.wasm.wasmPaths = "/ort/";
  ort.env.wasm.numThreads = 1;
  const [manifest, table] = await Promise.all([json("/bundle/manifest.json"), json("/bundle/run.json")]);
  const { config } = manifest;
  if (![1, 3].includes(config.in_channels) || manifest.sampler.prediction !== "flow") {
    throw new Error("this page shows models of pixels that predict a flow, such as the one that dcconvert demo converts");
  }
  const [full, skip] = await Promise.all(
    ["full", "skip"].map((graph) => ort.InferenceSession.create(`/bundle/onnx/${graph}.onnx`)),
  );
  byId("status").textContent = "Ready.";
  byId("start").disabled = false;
  byId("start").onclick = () => start({ ort, full, skip, config }, table);
} catch (error) {
  byId("status").textContent = `Not possible: ${error.message}`;
}
