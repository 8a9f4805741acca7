"""The ORL faces as training images for the tiny base model.

The photographs are the ORL database of faces, AT&T Laboratories Cambridge: 40 people, 10 grey photographs of 92 x 112 px
each. They are read from the asset cache that `launch/assets.sh` fills; which photograph may be used for what stands in the
committed split list (columns key, identity, split).
"""

import csv
import os
from pathlib import Path

import numpy as np
from PIL import Image

IMAGE_SIZE = 64
# The smallest square, in px of a 92 x 112 photograph, that still holds every face of the database.
SMALLEST_CROP = 80


def default_photos() -> Path:
    """The photo folder of the asset cache."""
    cache = os.environ.get("HYPERLORA_CACHE", str(Path.home() / ".cache" / "hyperlora"))
    return Path(cache) / "photos"


def read_split(split_csv: Path, wanted: str) -> list[str]:
    """Keys of the photographs of one split: `train`, `held_out` or `unseen`."""
    with open(split_csv, newline="", encoding="utf-8") as file:
        keys = [row["key"] for row in csv.DictReader(file) if row["split"] == wanted]
    if not keys:
        raise SystemExit(f"{split_csv}: no photograph of split {wanted!r}")
    return keys


def load_photos(photos: Path, keys: list[str]) -> list[np.ndarray]:
    """The photographs as uint8 arrays of shape [112, 92]."""
    images = []
    for key in keys:
        path = photos / key
        if not path.is_file():
            raise SystemExit(f"{path}: missing; run launch/assets.sh first, or name the photo folder with --photos")
        images.append(np.asarray(Image.open(path).convert("L")))
    return images


def crop(photo: np.ndarray, left: int, top: int, side: int, flip: bool) -> np.ndarray:
    """One square crop as float32 RGB in [-1, 1], shape [3, 64, 64]."""
    square = Image.fromarray(photo[top : top + side, left : left + side])
    resized = square.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    grey = np.asarray(resized, dtype=np.float32) / 127.5 - 1.0
    if flip:
        grey = grey[:, ::-1]
    return np.repeat(grey[None], 3, axis=0).copy()


def centre_crop(photo: np.ndarray) -> np.ndarray:
    """The largest square around the photograph's centre."""
    height, width = photo.shape
    side = min(height, width)
    return crop(photo, (width - side) // 2, (height - side) // 2, side, False)


def random_crop(photo: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, tuple[int, int, int]]:
    """A random square that holds the face, flipped half of the time; returns it and (left, top, side)."""
    height, width = photo.shape
    side = int(rng.integers(SMALLEST_CROP, width + 1))
    left = int(rng.integers(0, width - side + 1))
    # The chin reaches the lower quarter of a photograph and the hair its upper edge: keep the square in the middle.
    spare = height - side
    top = int(rng.integers(spare // 4, spare - spare // 4 + 1))
    return crop(photo, left, top, side, bool(rng.random() < 0.5)), (left, top, side)
