#!/usr/bin/env python3
"""Reads a run's event files with TensorBoard's own reader and checks that what a run should show is there.

Every scalar tag has strictly increasing steps (so a resumed run shows each step once) and finite values; at least one tag
stands under each expected prefix; images decode; texts are not empty. Prints a summary, exits 1 at the first fault.
"""

import argparse
import io
import math
import sys
from pathlib import Path

from PIL import Image
from tensorboard.backend.event_processing import event_accumulator

SCALARS = [
    "loss/",
    "optim/learning_rate",
    "optim/gradient_norm",
    "coefficients/",
    "speed/images_per_second",
    "speed/data_wait_share",
    "memory/",
]


def require(holds: bool, fault: str) -> None:
    if not holds:
        sys.exit(f"check_tensorboard: {fault}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run folder, which holds tensorboard/")
    parser.add_argument("--scalars", nargs="*", default=SCALARS, help="prefixes under which a scalar has to stand")
    parser.add_argument("--images", nargs="*", default=["samples"], help="the same for images")
    parser.add_argument("--texts", nargs="*", default=["config"], help="the same for texts")
    parser.add_argument("--last-step", type=int, help="the step of the last scalar")
    arguments = parser.parse_args()

    folder = arguments.run / "tensorboard"
    files = sorted(folder.glob("events.out.tfevents.*"))
    require(bool(files), f"{folder} holds no event file")
    events = event_accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()

    for kind, found, wanted in (
        ("scalar", tags["scalars"], arguments.scalars),
        ("image", tags["images"], arguments.images),
        ("text", tags["tensors"], arguments.texts),
    ):
        for prefix in wanted:
            require(any(tag.startswith(prefix) for tag in found), f"no {kind} under `{prefix}`, only {found}")

    last_step = -1
    for tag in tags["scalars"]:
        points = events.Scalars(tag)
        steps = [point.step for point in points]
        require(all(a < b for a, b in zip(steps, steps[1:])), f"`{tag}`: the steps {steps} do not increase")
        require(all(math.isfinite(point.value) for point in points), f"`{tag}` holds values that are not finite")
        last_step = max(last_step, steps[-1])
    if arguments.last_step is not None:
        require(last_step == arguments.last_step, f"the last step is {last_step}, not {arguments.last_step}")

    pictures = 0
    for tag in tags["images"]:
        for point in events.Images(tag):
            with Image.open(io.BytesIO(point.encoded_image_string)) as picture:
                picture.load()
                require(picture.size == (point.width, point.height), f"`{tag}`: the size is {picture.size}")
            pictures += 1
    for tag in tags["tensors"]:
        for point in events.Tensors(tag):
            require(bool(point.tensor_proto.string_val[0].decode()), f"the text `{tag}` is empty")
        plugin = events.SummaryMetadata(tag).plugin_data.plugin_name
        require(plugin == "text", f"`{tag}` belongs to the plugin `{plugin}`")

    print(
        f"{len(files)} event files: {len(tags['scalars'])} scalar tags up to step {last_step}, "
        f"{pictures} images, texts {tags['tensors']}"
    )


if __name__ == "__main__":
    main()
