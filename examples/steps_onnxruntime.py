"""Sample a bundle of mode steps with numpy and ONNX Runtime, and nothing of dcconvert.

    python examples/steps_onnxruntime.py out --labels 0 1 2 --seed 7 -o images.npy

All that a run needs is in the bundle: two graphs (`onnx/full.onnx`, `onnx/skip.onnx`), the numbers of each step
(`run.json`), and the shapes of the model (`manifest.json`). The loop in `sample` is the whole runtime.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime


def sample(bundle, noise, labels, guidance=None):
    """Images [B, C, H, W] from noise of that shape and labels [B]; `guidance` None: what the table was made for."""
    run = json.loads((bundle / "run.json").read_text())
    config = json.loads((bundle / "manifest.json").read_text())["config"]
    full, skip = (onnxruntime.InferenceSession(bundle / "onnx" / f"{graph}.onnx") for graph in ("full", "skip"))
    slots = next(value.shape[0] for value in skip.get_inputs() if value.name == "weights")
    guidance = run["guidance"] if guidance is None else guidance
    channels = noise.shape[1]

    x, outputs, updates = noise, [], []  # outputs and updates: newest first
    for row in run["rows"]:
        given = {"x": x, "y": labels}
        if guidance != 1:  # the conditional and the unconditional half in one batch
            given = {"x": np.concatenate([x, x]), "y": np.concatenate([labels, 0 * labels + config["num_classes"]])}
        given["t"] = np.full(len(given["x"]), row["t"], np.float32)

        if not row["weights"]:  # a computed step
            made, update = full.run(["output", "update"], given)
            updates = [update, *updates][:slots]
        else:  # a skipped step: the trunk's update is a weighted sum of the last ones
            weights = np.zeros((slots, len(given["x"])), np.float32)
            weights[: len(row["weights"])] = np.array(row["weights"])[:, None]
            known = updates + [np.zeros_like(updates[0])] * (slots - len(updates))
            named = {f"update_{age}": update for age, update in enumerate(known)}
            [made] = skip.run(["output"], {**given, **named, "weights": weights})

        made = made[:, :channels]  # without learned variances
        if guidance != 1:
            conditional, unconditional = np.split(made, 2)
            made = unconditional + guidance * (conditional - unconditional)
        outputs.insert(0, row["scale"] * made + row["shift"] * x)
        x = row["state"] * x + row["noise"] * noise
        x = x + sum(number * output for number, output in zip(row["outputs"], outputs, strict=False))
        x = x.astype(np.float32)
    return x


def main():
    parser = argparse.ArgumentParser(description="Sample a bundle of mode steps with ONNX Runtime alone.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--labels", type=int, nargs="+", default=[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("-o", "--out", type=Path, default=Path("images.npy"))
    args = parser.parse_args()
    config = json.loads((args.bundle / "manifest.json").read_text())["config"]
    size = config["image_size"]
    height, width = (size, size) if isinstance(size, int) else size
    shape = (len(args.labels), config["in_channels"], height, width)
    noise = np.random.default_rng(args.seed).standard_normal(shape, np.float32)
    np.save(args.out, sample(args.bundle, noise, np.array(args.labels, np.int64), args.guidance))
    print(f"Images {list(shape)}: {args.out}")


if __name__ == "__main__":
    main()
