"""The samples of a training stage as PyTorch users would load them: pyarrow, Pillow and a DataLoader."""

import io
import json
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageDraw, ImageFilter
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset

GREY = (127, 127, 127)
# The masks of the original, whose blurs are given for crops of 512 pixels.
REFERENCE_SIZE, MASK_BLUR, FACE_BLUR = 512, 15, 45
MASK_CROP, ID_CROP, ID_RAISED, BASE_OUTLINE = 0.8, 0.75, 0.125, 1.4
COLUMNS = [
    "key", "image", "width", "height", "face_box", "landmarks", "id_embedding", "caption", "identity", "split",
]  # fmt: skip


class Faces(Dataset):
    """A stage that draws the reference from the target's other photos; item `i` of any epoch is one of the targets."""

    def __init__(self, plan, epochs):
        self.plan = plan
        tables = [pq.read_table(path, columns=COLUMNS) for path in sorted(Path(plan["shards"]).glob("shard-*.parquet"))]
        rows = [row for table in tables for row in table.to_pylist()]
        self.rows = [row for row in rows if plan["split"] in ("all", row["split"])]
        self.photos = {}
        for index, row in enumerate(self.rows):
            self.photos.setdefault(row["identity"], []).append(index)
        self.targets = [index for index, row in enumerate(self.rows) if len(self.photos[row["identity"]]) > 1]
        processor = json.loads(Path(plan["preprocessing"]).read_text())
        self.edge, self.side = processor["size"]["shortest_edge"], processor["crop_size"]["height"]
        self.mean, self.std = (torch.tensor(processor[name])[:, None, None] for name in ("image_mean", "image_std"))
        self.epochs = epochs

    def __len__(self):
        return len(self.targets) * self.epochs

    def __getitem__(self, item):
        draw = np.random.default_rng(item)
        target = self.targets[item % len(self.targets)]
        row = self.rows[target]
        others = [index for index in self.photos[row["identity"]] if index != target]
        square = self.square(draw, (row["width"], row["height"]), row["face_box"])
        return self.sample(row, self.rows[draw.choice(others)], square, self.plan["flip"] and draw.integers(2) == 1)

    def square(self, draw, size, face_box):
        """A square around the face: its side uniform on a logarithmic scale, then its place."""
        (x0, y0, x1, y1), shorter = face_box, min(size)
        face = max(x1 - x0, y1 - y0, 1)
        largest = min(face * self.plan["crop"]["largest"], shorter)
        smallest = min(face * self.plan["crop"]["smallest"], largest)
        side = min(int(np.ceil(smallest * (largest / smallest) ** draw.random())), shorter)

        def place(extent, start, end):
            room = extent - side
            low, high = max(int(np.ceil(end)) - side, 0), min(max(int(start), 0), room)
            return int(draw.integers(low, high + 1)) if low <= high else int(np.clip((start + end - side) / 2, 0, room))

        return place(size[0], x0, x1), place(size[1], y0, y1), side

    def sample(self, row, reference, square, flip):
        x, y, side = square
        view = decode(row).crop((x, y, x + side, y + side))
        landmarks = np.array(row["landmarks"], np.float32).reshape(-1, 2) - np.float32([x, y])
        base = self.base_image(view, landmarks)
        face = view.resize((self.plan["image_size"],) * 2, Image.Resampling.BICUBIC)
        if flip:
            base, face = (image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in (base, face))
        return {
            "pixels": planes(face) / 127.5 - 1,
            "id_pixels": self.pixel_values(self.id_image(decode(reference), reference)),
            "base_pixels": self.pixel_values(base),
            "id_embedding": torch.tensor(reference["id_embedding"]),
            "posterior_noise": torch.randn(self.plan["latent"]),
            "noise": torch.randn(self.plan["latent"]),
            "timesteps": torch.randint(self.plan["timesteps"], ()),
            "caption": row["caption"],
        }

    def pixel_values(self, image):
        """As CLIP's image processor."""
        scale = self.edge / min(image.size)
        width, height = (int(edge * scale) for edge in image.size)
        left, top = (width - self.side) // 2, (height - self.side) // 2
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        image = image.crop((left, top, left + self.side, top + self.side))
        return (planes(image) / 255 - self.mean) / self.std

    def mask(self, landmarks, grown):
        """The mask crop's corner and side in the photo, and how much each of its places belongs to the face."""
        size = self.plan["mask_size"]
        corners = outline(landmarks)
        centre, half = corners.mean(0), max(MASK_CROP * np.ptp(corners, axis=0).max(), 1)
        mask = Image.new("L", (size, size))
        drawn = (grown * (corners - centre) + half) * (size / (2 * half))
        ImageDraw.Draw(mask).polygon([tuple(point) for point in drawn], fill=255)
        blurred = mask.filter(ImageFilter.GaussianBlur(MASK_BLUR * size / REFERENCE_SIZE))
        return centre - half, 2 * half, blurred

    def id_image(self, photo, row):
        """The face alone on grey."""
        size = self.plan["mask_size"]
        landmarks = np.array(row["landmarks"], np.float32).reshape(-1, 2)
        corner, side, mask = self.mask(landmarks, 1.0)
        low, high = landmarks.min(0), landmarks.max(0)
        half = ID_CROP * (high - low).max()
        start = (low + high) / 2 - np.float32([half, half + ID_RAISED * half])
        crop = cut(photo, start, 2 * half / size, (size, size))
        shown = cut(mask, (start - corner) * size / side, 2 * half / side, (size, size))
        return Image.composite(crop, Image.new("RGB", (size, size), GREY), shown)

    def base_image(self, view, landmarks):
        """The face blurred away."""
        size = self.plan["mask_size"]
        corner, side, mask = self.mask(landmarks, BASE_OUTLINE)
        beyond = int(np.ceil(max(*-corner, *(corner + side - view.size), 0)))
        around = with_edge(view, beyond) if beyond else view
        crop = cut(around, corner + beyond, side / size, (size, size))
        blurred = crop.filter(ImageFilter.GaussianBlur(FACE_BLUR * size / REFERENCE_SIZE))
        back = [cut(image, -corner * size / side, size / side, view.size) for image in (blurred, mask)]
        return Image.composite(back[0], view, back[1])


def decode(row):
    return Image.open(io.BytesIO(row["image"])).convert("RGB")


def planes(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def with_edge(image, width):
    """The image with its outermost pixels repeated."""
    return Image.fromarray(np.pad(np.array(image), ((width, width), (width, width), (0, 0)), mode="edge"))


def cut(image, corner, step, size):
    """`size` pixels of an image from `corner` on, `step` of its pixels apart."""
    return image.transform(
        size, Image.Transform.AFFINE, (step, 0, corner[0], 0, step, corner[1]), Image.Resampling.BILINEAR
    )


def outline(landmarks):
    """Jaw and brows of 68 points."""
    if len(landmarks) != 68:
        raise SystemExit(f"error: faces have {len(landmarks)} landmarks\n  remedy: this side knows those with 68")
    return landmarks[[*range(17), *reversed(range(17, 27))]]


def differences(exchange):
    """Mean absolute difference of what the Rust side wrote and this side makes of the same draws, by tensor."""
    faces = Faces(json.loads((exchange / "plan.json").read_text()), 1)
    rows = {row["key"]: row for row in faces.rows}
    checked = load_file(exchange / "check.safetensors")
    made = [
        faces.sample(rows[draw["target"]], rows[draw["reference"]], draw["square"], draw["flip"])
        for draw in faces.plan["checked"]
    ]
    names = ("pixels", "id_pixels", "base_pixels", "id_embedding")
    return {name: (checked[name] - torch.stack([one[name] for one in made])).abs().mean().item() for name in names}


def run(exchange, workers, epochs):
    """Loads epochs, from closed shards to batches; the samples and the seconds."""
    start = time.perf_counter()
    plan = json.loads((exchange / "plan.json").read_text())
    faces = Faces(plan, epochs)
    # Forked: the workers share the photos with this process, and start at once.
    workers = {"num_workers": workers, "multiprocessing_context": "fork", "prefetch_factor": 8}
    loader = DataLoader(faces, batch_size=plan["batch"], shuffle=True, **workers)
    samples = sum(len(batch["pixels"]) for batch in loader)
    return {"samples": samples, "seconds": time.perf_counter() - start}
