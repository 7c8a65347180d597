"""From the camera's full picture to what is in the ring: cut, scaled, turned, flipped, masked."""

from collections.abc import Callable
from typing import Any

import numpy as np

from common.config import Camera
from common.geometry import fit, outside
from services.capture.source import Picture

_SOFT = 0.5  # scaled down further than this, pixels are averaged, not picked


class Shaping:
    """
    Raises:
        SourceError: the crop does not lie in a picture of this size.
    """

    def __init__(self, camera: Camera, width: int, height: int) -> None:
        self._camera = camera
        shape = fit((width, height), camera.crop, camera.rotate, camera.flip, camera.scale)
        x, y, w, h = shape.crop
        self._cut = np.s_[y : y + h, x : x + w]
        self._scaled, self.size, self.view = shape.scaled, shape.size, shape.view
        self.full: Picture | None = None  # where the source writes; None: straight into the ring
        if self.view is not None:
            self.full = np.empty((height, width, 3), np.uint8)
        place = self.view.from_full if self.view else tuple
        self._masks = [
            np.rint([place(point) for point in mask]).astype(np.int32) for mask in camera.masks
        ]
        self.problem = "; ".join(outside(camera.polygons, width, height))
        """What of the configuration does not fit a picture of this size."""

    def apply(self, into: Picture) -> None:
        """Fill `into` (height x width x 3) from `full`, where there is one; blacken the masks."""
        if self.full is not None:
            self._shape(self.full[self._cut], into)
        if self._masks:
            import cv2  # only where it is needed: memory

            cv2.fillPoly(into, self._masks, (0, 0, 0))

    def _shape(self, picture: Picture, into: Picture) -> None:
        import cv2

        camera = self._camera
        steps: list[Callable[[Picture, Picture | None], Any]] = []
        if self._scaled != picture.shape[1::-1]:
            how = cv2.INTER_AREA if camera.scale < _SOFT else cv2.INTER_LINEAR
            steps.append(lambda p, to: cv2.resize(p, self._scaled, to, interpolation=how))
        if camera.rotate:
            code = camera.rotate // 90 - 1  # ROTATE_90_CLOCKWISE, ROTATE_180, ...
            steps.append(lambda p, to: cv2.rotate(p, code, to))
        if camera.flip != "none":
            axes = {"vertical": 0, "horizontal": 1, "both": -1}[camera.flip]
            steps.append(lambda p, to: cv2.flip(p, axes, to))
        for step in steps[:-1]:
            picture = step(picture, None)
        if steps:
            steps[-1](picture, into)
        else:
            np.copyto(into, picture)
