"""Opens image files with the limits of the data, not those of Pillow."""

from __future__ import annotations

import os
from threading import Lock
from typing import Any

from PIL import Image

LOCK = Lock()


def open_image(path: str | os.PathLike[str] | Any) -> Image.Image:
    """Opens an image of any size; pixels are decoded only by `load` and the like.

    Pillow refuses images above 179 million pixels and warns at half of them. It looks at the size
    only, which is harmless, and OpenCV, which decodes the images, reads up to 1074 million.

    Raises:
        OSError: There is no such file, or it is no image.
    """
    with LOCK:  # for other threads that would take None as the usual limit
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(path)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
