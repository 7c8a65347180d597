"""Train the factory model and write its four files with a record of how they came to be.

Only scenes of the domain "train" are used, also to calibrate integers and to watch progress
(other seeds); `scripts/bench/factory` measures on families never seen here.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf
from tensorflow import keras

from scripts.factory import data, export, net
from services.capture.scene import LABELS

PACKAGES = ("tensorflow", "tensorflow-cpu", "tf2onnx", "onnx", "onnxruntime", "numpy",
            "opencv-python-headless")  # fmt: skip
LOSSES = ("box", "obj", "cls", "watch_box", "watch_obj", "watch_cls")


def train(args: argparse.Namespace) -> tuple[keras.Model, list[dict[str, float]]]:
    keras.utils.set_random_seed(args.seed)
    pictures, boxes = data.render(args.cache, "train", range(args.scenes), args.frames)
    print(f"{len(boxes)} pictures, {sum(map(len, boxes))} things", flush=True)
    watch, watch_boxes = data.render(args.cache, "train", range(100_000, 100_020), 10)
    watched = [np.stack(x) for x in zip(*map(data.answers, watch_boxes), strict=True)]
    model = net.build(len(LABELS))
    print(f"{model.count_params()} parameters", flush=True)
    steps = args.epochs * (len(boxes) // args.batch)
    warm = steps // 20
    rate = keras.optimizers.schedules.CosineDecay(
        args.rate / 20, steps - warm, alpha=0.01, warmup_target=args.rate, warmup_steps=warm
    )
    optimizer = keras.optimizers.AdamW(rate, weight_decay=1e-3)

    @tf.function  # type: ignore[untyped-decorator]
    def step(batch: tf.Tensor, kind: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            outputs = model(net.other_light(batch), training=True)
            losses = tf.stack(net.loss(outputs, kind, target, len(LABELS)))
            total = tf.tensordot(losses, [2.0, 1.0, 0.5], 1)
        gradients = tape.gradient(total, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return losses

    @tf.function  # type: ignore[untyped-decorator]
    def look(batch: tf.Tensor, kind: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
        outputs = model(tf.cast(batch, tf.float32), training=False)
        return tf.stack(net.loss(outputs, kind, target, len(LABELS)))

    n = len(data.CELLS)
    feed = tf.data.Dataset.from_generator(
        lambda: data.batches(pictures, boxes, args.batch, args.seed),
        output_signature=(
            tf.TensorSpec((args.batch, data.HEIGHT, data.WIDTH, 3), tf.uint8),
            tf.TensorSpec((args.batch, n), tf.int32),
            tf.TensorSpec((args.batch, n, 4), tf.float32),
        ),
    ).prefetch(4)
    history, sums = [], np.zeros(3)
    per_epoch = len(boxes) // args.batch
    started = time.monotonic()
    for number, batch in enumerate(feed.take(steps), 1):
        sums += step(*batch).numpy()
        if number % per_epoch == 0:
            seen = look(np.asarray(watch), *watched).numpy()
            values = [round(float(value), 4) for value in (*(sums / per_epoch), *seen)]
            row = dict(zip(LOSSES, values, strict=True))
            history.append(row)
            sums[:] = 0
            print(number // per_epoch, f"{time.monotonic() - started:.0f} s", row, flush=True)
    return model, history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("models/factory"))
    parser.add_argument("--cache", type=Path, default=Path("build/factory"))
    parser.add_argument("--scenes", type=int, default=1200)
    parser.add_argument("--frames", type=int, default=10, help="of each scene")
    parser.add_argument("--epochs", type=int, default=18)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    started = time.monotonic()
    model, history = train(args)
    trained_s = round(time.monotonic() - started)
    args.out.mkdir(parents=True, exist_ok=True)
    model.save_weights(args.cache / "model.weights.h5")
    pictures, _ = data.render(args.cache, "train", range(args.scenes), args.frames)
    samples = np.asarray(pictures[:: max(1, len(pictures) // 200)])
    agreement = export.write(net.with_scores(model), samples, args.out)
    found = importlib.metadata.distributions()
    installed = {one.metadata["Name"].replace("_", "-"): one.version for one in found}
    record = {
        "scenes_sha256": data.definition(),
        "domain": "train",
        "scene_seeds": [0, args.scenes - 1],
        "frames_per_scene": args.frames,
        "seed": args.seed,
        "epochs": args.epochs,
        "batch": args.batch,
        "rate": args.rate,
        "parameters": int(model.count_params()),
        "rendered_and_trained_s": trained_s,
        "exported_s": round(time.monotonic() - started) - trained_s,
        "cpu_s": round(sum(os.times()[:4])),  # all threads and children: what the others left
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: installed[name] for name in PACKAGES if name in installed},
        "bytes": {file.name: file.stat().st_size for file in sorted(args.out.glob("model.*"))},
        "agreement_with_keras": agreement,
        "epochs_losses": history,
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({k: v for k, v in record.items() if k != "epochs_losses"}))


if __name__ == "__main__":
    main()
