// Sample a bundle of mode steps with onnxruntime-node, and nothing of dcconvert.
//
//   npm install onnxruntime-node
//   node examples/steps_node.mjs out images.f32 --labels 0,1,2 --seed 7
//   node examples/steps_node.mjs out images.f32 --labels 0,1,2 --noise noise.f32   (float32, [B, C, H, W])
//
// The loop is in steps.mjs.

import { readFile, writeFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { join } from "node:path";
import { parseArgs } from "node:util";

import { normal, sample, shapeOf } from "./steps.mjs";

// From where the program is started, so that the package need not lie beside this file.
const ort = createRequire(join(process.cwd(), "package.json"))("onnxruntime-node");

const json = async (...path) => JSON.parse(await readFile(join(...path), "utf8"));

const floats = (bytes) => new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    labels: { type: "string", default: "0" },
    seed: { type: "string", default: "0" },
    guidance: { type: "string" },
    noise: { type: "string" },
  },
});
const [bundle, target] = positionals;
if (!bundle || !target) {
  console.error("usage: node steps_node.mjs BUNDLE IMAGES.f32 [--labels 0,1] [--seed N] [--guidance X] [--noise FILE]");
  process.exit(2);
}
const labels = values.labels.split(",").map(Number);
const run = await json(bundle, "run.json");
const { config } = await json(bundle, "manifest.json");
const [full, skip] = await Promise.all(
  ["full", "skip"].map((graph) => ort.InferenceSession.create(join(bundle, "onnx", `${graph}.onnx`))),
);
const [height, width] = shapeOf(config);
const count = labels.length * config.in_channels * height * width;
const noise = values.noise ? floats(await readFile(values.noise)) : normal(count, Number(values.seed));
if (noise.length !== count) throw new Error(`${values.noise} holds ${noise.length} numbers, ${count} are needed`);
const guidance = values.guidance === undefined ? null : Number(values.guidance);
const images = await sample({ ort, full, skip, run, config, noise, labels, guidance });
await writeFile(target, Buffer.from(images.buffer));
console.log(`Images [${labels.length}, ${config.in_channels}, ${height}, ${width}], float32: ${target}`);
