"""Rendered scenes as training data, and what the network has to answer for each of its cells."""

import ast
import hashlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from services.capture import dice, scene, scenery, sprite
from services.capture.scene import LABELS, VISIBLE, Scene, clip

WIDTH, HEIGHT = 320, 240  # the network's input; scenes are rendered at twice that and scaled
STRIDES = (8, 16)
LARGE = 36.0  # longest side from which a thing belongs to the second stride
REACH = (1.0, 1.5)  # cells whose middle is within so many strides of a thing's middle answer for it

Pictures = NDArray[np.uint8]  # [n, HEIGHT, WIDTH, 3] RGB
Boxes = NDArray[np.float32]  # [things, 7] class, x1 y1 x2 y2 clipped, visible share, longest side


def definition() -> str:
    """Which scenes these are: the sha256 of the code that renders them, whatever its comments."""
    files = sorted(str(module.__file__) for module in (dice, scene, scenery, sprite))
    code = "".join(ast.dump(ast.parse(Path(file).read_text())) for file in files)
    return hashlib.sha256(code.encode()).hexdigest()


def render_scene(seed: int, domain: str, frames: int) -> tuple[Pictures, list[Boxes]]:
    """`frames` pictures of one scene, far enough apart to show other parts each time."""
    cv2.setNumThreads(1)
    line = Scene(640, 480, seed, domain, gaps=0.05, defects=1.3)
    pictures = np.empty((frames, HEIGHT, WIDTH, 3), np.uint8)
    boxes = []
    for number in range(frames):
        index = number * 83
        small = cv2.resize(line.render(index)[0], (WIDTH, HEIGHT), interpolation=cv2.INTER_LINEAR)
        pictures[number] = cv2.cvtColor(small, cv2.COLOR_BGR2RGB)
        rows = []
        for thing in line.things(index):
            x1, y1, x2, y2 = (side / 2 for side in thing.box)
            inside = clip((x1, y1, x2, y2), WIDTH, HEIGHT)
            rows.append([LABELS.index(thing.label), *inside, thing.visible, max(x2 - x1, y2 - y1)])
        boxes.append(np.array(rows, np.float32).reshape(-1, 7))
    return pictures, boxes


def render(
    cache: Path, domain: str, seeds: range, frames: int, jobs: int = 2
) -> tuple[Pictures, list[Boxes]]:
    """All pictures of the scenes `seeds`, from `cache` if they were rendered before."""
    name = f"{domain}-{seeds.start}-{seeds.stop}-{frames}-{definition()[:12]}"
    file = cache / f"{name}.npy"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        shape = (len(seeds) * frames, HEIGHT, WIDTH, 3)
        pictures = np.lib.format.open_memmap(part, "w+", np.uint8, shape)
        boxes: list[Boxes] = []
        with ProcessPoolExecutor(jobs) as pool:
            one = partial(render_scene, domain=domain, frames=frames)
            for scene_pictures, scene_boxes in pool.map(one, seeds, chunksize=4):
                pictures[len(boxes) : len(boxes) + frames] = scene_pictures
                boxes += scene_boxes
        counts = np.array([len(rows) for rows in boxes])
        np.savez(cache / f"{name}.npz", counts=counts, rows=np.concatenate(boxes))
        pictures.flush()
        part.rename(file)
    pictures = np.load(file, mmap_mode="r")
    truth = np.load(cache / f"{name}.npz")
    return pictures, np.split(truth["rows"], np.cumsum(truth["counts"])[:-1])


def cells() -> NDArray[np.float32]:
    """[N, 3]: column, row and stride of each cell, strides ascending, row by row, as in YOLOX."""
    grids = []
    for stride in STRIDES:
        x, y = np.meshgrid(np.arange(WIDTH // stride), np.arange(HEIGHT // stride))
        grids.append(np.stack([x.ravel(), y.ravel(), np.full(x.size, stride)], 1))
    return np.concatenate(grids).astype(np.float32)


CELLS = cells()


def answers(boxes: Boxes) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """What each cell has to say: its class [N] (-1: nothing, -2: not asked) and box [N, 4]."""
    kind = np.full(len(CELLS), -1, np.int32)
    target = np.zeros((len(CELLS), 4), np.float32)
    column, row, stride = CELLS.T
    cx, cy = (column + 0.5) * stride, (row + 0.5) * stride
    for label, x1, y1, x2, y2, visible, side in sorted(boxes.tolist(), key=lambda r: -r[6]):
        level = stride == STRIDES[side > LARGE]
        if visible < VISIBLE:
            kind[level & (kind == -1) & (cx > x1) & (cx < x2) & (cy > y1) & (cy < y2)] = -2
            continue
        reach = REACH[side > LARGE] * stride
        near = (np.abs(cx - (x1 + x2) / 2) < reach) & (np.abs(cy - (y1 + y2) / 2) < reach)
        kind[level & near] = label
        target[level & near] = x1, y1, x2, y2
    return kind, target


def mirrored(boxes: Boxes, across: bool, down: bool) -> Boxes:
    out = boxes.copy()
    if across:
        out[:, [1, 3]] = WIDTH - boxes[:, [3, 1]]
    if down:
        out[:, [2, 4]] = HEIGHT - boxes[:, [4, 2]]
    return out


def batches(
    pictures: Pictures, boxes: list[Boxes], size: int, seed: int
) -> Iterator[tuple[Pictures, NDArray[np.int32], NDArray[np.float32]]]:
    """Endless batches of pictures, classes and boxes, shuffled and mirrored at random."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(boxes))
        for start in range(0, len(order) - size + 1, size):
            chosen = np.sort(order[start : start + size])
            flips = rng.random((size, 2)) < 0.5
            batch = np.empty((size, HEIGHT, WIDTH, 3), np.uint8)
            said = []
            for place, (number, (across, down)) in enumerate(zip(chosen, flips, strict=True)):
                batch[place] = pictures[number][:: -1 if down else 1, :: -1 if across else 1]
                said.append(answers(mirrored(boxes[number], across, down)))
            yield batch, np.stack([k for k, _ in said]), np.stack([b for _, b in said])
