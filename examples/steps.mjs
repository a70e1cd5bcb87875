// The loop of a run in mode steps, for any ONNX Runtime in JavaScript. It is that of steps_onnxruntime.py.

/**
 * Images from noise, both Float32Array of shape [labels.length, C, H, W].
 *
 * `ort`: onnxruntime-node or onnxruntime-web. `full` and `skip`: sessions over the bundle's graphs. `run`: run.json.
 * `config`: that of manifest.json. `guidance` null: what the table was made for. `onStep(row, x)` is awaited after each step.
 */
export async function sample({ ort, full, skip, run, config, noise, labels, guidance = null, onStep = () => {} }) {
  const scale = guidance ?? run.guidance;
  const halves = scale === 1 ? 1 : 2;
  const batch = labels.length * halves;
  const size = noise.length / labels.length;
  const slots = skip.inputNames.filter((name) => name.startsWith("update_")).length;
  const nulls = labels.map(() => config.num_classes);
  const y = new ort.Tensor("int64", BigInt64Array.from([...labels, ...(halves === 2 ? nulls : [])].map(BigInt)), [batch]);

  let x = noise;
  const outputs = []; // newest first, as are updates
  let updates = [];
  for (const row of run.rows) {
    const both = new Float32Array(noise.length * halves);
    for (let half = 0; half < halves; half++) both.set(x, half * noise.length);
    const given = {
      x: new ort.Tensor("float32", both, [batch, config.in_channels, ...shapeOf(config)]),
      y,
      t: new ort.Tensor("float32", new Float32Array(batch).fill(row.t), [batch]),
    };
    let made;
    if (row.weights.length === 0) { // a computed step
      const found = await full.run(given);
      made = found.output;
      updates = [found.update, ...updates].slice(0, slots);
    } else { // a skipped step: the trunk's update is a weighted sum of the last ones
      const weights = new Float32Array(slots * batch);
      row.weights.forEach((weight, age) => weights.fill(weight, age * batch, (age + 1) * batch));
      given.weights = new ort.Tensor("float32", weights, [slots, batch]);
      for (let age = 0; age < slots; age++) given[`update_${age}`] = updates[age] ?? zeros(updates[0]);
      made = (await skip.run(given)).output;
    }
    outputs.unshift(velocity(row, x, made, labels.length, size, scale));
    x = moved(row, x, noise, outputs);
    await onStep(row, x);
  }
  return x;
}

/** [height, width] of an image. */
export const shapeOf = ({ image_size }) => (Array.isArray(image_size) ? image_size : [image_size, image_size]);

const zeros = (like) => new ort.Tensor("float32", new Float32Array(like.data.length), like.dims);

/** scale * output + shift * x, under guidance and without learned variances. */
function velocity(row, x, made, images, size, guidance) {
  const stride = made.data.length / made.dims[0]; // a sample's values, its variances included
  return x.map((value, i) => {
    const place = Math.floor(i / size) * stride + (i % size);
    const conditional = made.data[place];
    const other = guidance === 1 ? conditional : made.data[place + images * stride];
    return row.scale * (other + guidance * (conditional - other)) + row.shift * value;
  });
}

/** state * x + noise * x_0 + outputs[0] * v_i + outputs[1] * v_{i-1} + ... */
function moved(row, x, noise, outputs) {
  return x.map((value, i) =>
    row.outputs.reduce((sum, number, age) => sum + number * outputs[age][i], row.state * value + row.noise * noise[i]),
  );
}

/** Normal numbers by Box and Muller, from a small generator with a seed (mulberry32). */
export function normal(count, seed) {
  const uniform = () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let z = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    z = (z + Math.imul(z ^ (z >>> 7), 61 | z)) ^ z;
    return ((z ^ (z >>> 14)) >>> 0) / 4294967296;
  };
  return Float32Array.from({ length: count }, () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform()));
}
