"""From the camera's full picture to what is in the ring: cut, scaled, turned, flipped, masked."""

from collections.abc import Callable
from typing import Any

import numpy as np

from common.config import Camera
from common.errors import SourceError
from common.geometry import View, outside
from services.capture.source import Picture

_SOFT = 0.5  # scaled down further than this, pixels are averaged, not picked


class Shaping:
    """
    Raises:
        SourceError: the crop does not lie in a picture of this size.
    """

    def __init__(self, camera: Camera, width: int, height: int) -> None:
        self._camera = camera
        crop = camera.crop or (0, 0, width, height)
        x, y, w, h = crop
        if x < 0 or y < 0 or x + w > width or y + h > height:
            raise SourceError(
                f"crop = {list(crop)} lies outside the {width}x{height} picture; it is x, y, "
                "width, height"
            )
        self._cut = np.s_[y : y + h, x : x + w]
        self._scaled = max(1, round(w * camera.scale)), max(1, round(h * camera.scale))
        turned = camera.rotate in (90, 270)
        self.width, self.height = self._scaled[::-1] if turned else self._scaled
        view = View.make((width, height), crop, camera.rotate, camera.flip, self.size)
        self.full: Picture | None = None  # where the source writes; None: straight into the ring
        self.view: View | None = None
        if view.matrix != (1, 0, 0, 0, 1, 0) or self.size != (width, height):
            self.view, self.full = view, np.empty((height, width, 3), np.uint8)
        place = self.view.from_full if self.view else tuple
        self._masks = [
            np.rint([place(point) for point in mask]).astype(np.int32) for mask in camera.masks
        ]
        places = {f"zones.{name}": zone.points for name, zone in camera.zones.items()}
        places |= {f"masks[{index}]": mask for index, mask in enumerate(camera.masks)}
        self.problem = "; ".join(outside(places, width, height))
        """What of the configuration does not fit a picture of this size."""

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height

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
