"""How good the factory model is on scenes unlike those of its training, and what one gets without.

Scenes: rendered at 640x480, one picture each, of the domain "held_out" (or --domain): no surface,
belt, lamp, colour temperature or defect shape of the training scenes occurs in it; a test holds
the families apart. 1.2 defects a part on average. Model: the shipped bundle's first variant (the
int8 TFLite file) through the engine as the inference service uses it, with the manifest's own
thresholds. Baseline: `factory_baseline`, tuned on training scenes (--tune does it anew).

Counting (`factory_metrics`): IoU >= 0.5, class by class; things less than 60 % inside the picture
count neither way. `precision` and `recall` are over all classes together, parts and defects;
`defects_*` leave the parts out; `baseline_f1` is of the baseline over all classes.
The last line is JSON.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from common.engine.bundle import open_bundle
from common.engine.model import Model
from scripts.bench import factory_baseline as baseline
from scripts.bench.factory_metrics import Count, Found, count
from services.capture.scene import LABELS, Scene, Thing
from services.capture.sprite import Picture

FACTORY = Path("models/factory")
FIRST_SEED = 1_000_000


def views(domain: str, scenes: int) -> Iterator[tuple[Picture, tuple[Thing, ...]]]:
    for number in range(scenes):
        scene = Scene(640, 480, FIRST_SEED + number, domain, defects=1.2)
        index = 211 * number
        yield scene.render(index)[0], scene.things(index)


def predict(model: Model, picture: Picture) -> list[Found]:
    geometry = model.prepare(picture, 0)
    items = model.decode(model.infer(0), geometry)
    return [Found(item.label, item.score, item.box) for item in items if item.box is not None]


def figures(counts: dict[str, Count]) -> dict[str, float | dict[str, float]]:
    whole = sum(counts.values(), Count())
    defects = sum((counts[label] for label in LABELS[1:]), Count())
    return {
        "precision": round(whole.precision, 4),
        "recall": round(whole.recall, 4),
        "f1": round(whole.f1, 4),
        "defects_precision": round(defects.precision, 4),
        "defects_recall": round(defects.recall, 4),
        "defects_f1": round(defects.f1, 4),
        "class_precision": {label: round(one.precision, 4) for label, one in counts.items()},
        "class_recall": {label: round(one.recall, 4) for label, one in counts.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=FACTORY)
    parser.add_argument("--runtime", help="of the bundle's variants; default: the first")
    parser.add_argument("--scenes", type=int, default=400)
    parser.add_argument("--domain", default="held_out")
    parser.add_argument("--tune", action="store_true", help="tune the baseline on training scenes")
    args = parser.parse_args()
    settings = baseline.Settings()
    if args.tune:
        settings = baseline.tune(list(views("train", 60)))
    model = Model.load(open_bundle(args.bundle), runtime=args.runtime)
    ours, theirs = ({label: Count() for label in LABELS} for _ in range(2))
    for picture, things in views(args.domain, args.scenes):
        for counts, found in (
            (ours, predict(model, picture)),
            (theirs, baseline.inspect(picture, settings)),
        ):
            for label, one in count(found, things).items():
                counts[label] += one
    print(f"{'':14}{'things':>7}{'precision':>11}{'recall':>8}{'baseline P':>12}{'R':>7}")
    for label in LABELS:
        a, b = ours[label], theirs[label]
        print(
            f"{label:14}{a.right + a.missed:7}{a.precision:11.3f}{a.recall:8.3f}"
            f"{b.precision:12.3f}{b.recall:7.3f}"
        )
    shown = figures(ours)
    shown |= {f"baseline_{key}": value for key, value in figures(theirs).items()}
    about = {"scenes": args.scenes, "domain": args.domain, "model": model.version,
             "runtime": model.runtime}  # fmt: skip
    print(json.dumps(about | shown))


if __name__ == "__main__":
    main()
