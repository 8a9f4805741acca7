#!/usr/bin/env python3
"""Makes data-prep/tests/fixtures/faces: random ONNX models shaped like insightface's, and what insightface does with them.

    python ci/parity/face_fixtures.py --insightface insightface-0.7.3.tar.gz

The archive is a download of https://pypi.org/project/insightface/0.7.3/#files. Needs onnx, onnxruntime, numpy, opencv-python-headless, scikit-image (ci/parity/requirements.txt). Of insightface only the
classes SCRFD, Landmark and ArcFaceONNX are imported, straight from the archive once its checksum is right (`pip download`
would run its setup.py before); no weights are needed. The graphs average the
input over cells and mix the averages with random weights, so that the outputs depend on every step of the preprocessing.
"""

import argparse
import hashlib
import json
import shutil
import sys
import tarfile
import tempfile
import types
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

OUT = Path(__file__).resolve().parents[2] / "data-prep/tests/fixtures/faces"
THRESHOLD = 0.5
INSIGHTFACE = "f191f719612ebb37018f41936814500544cd0f86e6fcd676c023f354c668ddf7"
README = """# Fixtures of the face models

Made by `ci/parity/face_fixtures.py`: random ONNX graphs with the inputs and outputs of insightface's models, two drawn
photos, and in `expected.json` what the classes of insightface 0.7.3 compute from them. `antelopev2` is laid out as insightface
lays out the pack of that name. No weights of insightface are in here.
"""


def insightface(archive):
    """The classes under comparison, imported from the archive without the package's other dependencies."""
    if hashlib.sha256(Path(archive).read_bytes()).hexdigest() != INSIGHTFACE:
        raise SystemExit(f"{archive}: is not insightface 0.7.3 as PyPI has it (SHA-256 {INSIGHTFACE})")
    folder = Path(tempfile.mkdtemp())
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    root = next(folder.glob("insightface-*/insightface"))
    for name in ("", ".model_zoo", ".utils"):
        package = types.ModuleType(f"insightface{name}")
        package.__path__ = [str(root / name.lstrip("."))]
        sys.modules[package.__name__] = package
    # Only the 3D model asks for it.
    sys.modules["insightface.data"] = types.ModuleType("insightface.data")
    sys.modules["insightface.data"].get_object = None
    from insightface.model_zoo.arcface_onnx import ArcFaceONNX
    from insightface.model_zoo.landmark import Landmark
    from insightface.model_zoo.scrfd import SCRFD

    shutil.rmtree(folder)
    return SCRFD, Landmark, ArcFaceONNX


def save(path, nodes, constants, inputs, outputs):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    describe = lambda pair: helper.make_tensor_value_info(pair[0], TensorProto.FLOAT, pair[1])
    graph = helper.make_graph(nodes, "graph", [describe(i) for i in inputs], [describe(o) for o in outputs], values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def detector(path, rng, strides, anchors, batched, side):
    """SCRFD's outputs: scores, boxes and points of all strides, in this order."""
    nodes, constants, outputs = [], {}, {"scores": [], "boxes": [], "points": []}
    for stride in strides:
        gain = rng.normal(0, 1.0, (anchors * 15, 3, 1, 1)).astype(np.float32)
        gain[:anchors] *= 5
        gain[anchors : 5 * anchors] *= 0.7
        shift = rng.uniform(0.8, 2.0, anchors * 15).astype(np.float32)
        shift[:anchors] = -4.5
        constants |= {f"gain{stride}": gain, f"shift{stride}": shift}
        pool = dict(kernel_shape=[stride, stride], strides=[stride, stride])
        nodes.append(helper.make_node("AveragePool", ["input.1"], [f"cells{stride}"], **pool))
        nodes.append(helper.make_node("Conv", [f"cells{stride}", f"gain{stride}", f"shift{stride}"], [f"mixed{stride}"]))
        parts = {"scores": (0, 1, "Sigmoid"), "boxes": (1, 4, "Softplus"), "points": (5, 10, "Identity")}
        for part, (begin, width, shape_of) in parts.items():
            name = f"{part}{stride}"
            constants |= {f"{name}b": np.int64([begin * anchors]), f"{name}e": np.int64([(begin + width) * anchors])}
            constants |= {"axis": np.int64([1]), f"{part}s": np.int64([1, -1, width] if batched else [-1, width])}
            nodes += [
                helper.make_node("Slice", [f"mixed{stride}", f"{name}b", f"{name}e", "axis"], [f"{name}0"]),
                helper.make_node(shape_of, [f"{name}0"], [f"{name}1"]),
                helper.make_node("Transpose", [f"{name}1"], [f"{name}2"], perm=[0, 2, 3, 1]),
                helper.make_node("Reshape", [f"{name}2", f"{part}s"], [name]),
            ]
            outputs[part].append((name, [1, None, width] if batched else [None, width]))
    save(path, nodes, constants, [("input.1", [1, 3, side, side])], sum(outputs.values(), []))


def mixer(path, rng, side, cell, length, first=(), batch=None, rank=8):
    """A model from a picture to `length` numbers. `first` names leading nodes, for the rule that reads them."""
    features = 3 * (side // cell) ** 2
    constants = {
        "shape": np.int64([-1, features]),
        "down": rng.normal(0, 1 / np.sqrt(features), (features, rank)).astype(np.float32),
        "up": rng.normal(0, 1 / np.sqrt(rank), (rank, length)).astype(np.float32),
    }
    nodes, at = [], "data"
    for number, (name, kind, value) in enumerate(first):
        constants[f"first{number}"] = np.float32(value)
        nodes.append(helper.make_node(kind, [at, f"first{number}"], [f"at{number}"], name=name))
        at = f"at{number}"
    nodes += [
        helper.make_node("AveragePool", [at], ["cells"], kernel_shape=[cell, cell], strides=[cell, cell]),
        helper.make_node("Reshape", ["cells", "shape"], ["flat"]),
        helper.make_node("MatMul", ["flat", "down"], ["few"]),
        # Not linear, so that the scale of the pixels shows in the direction too.
        helper.make_node("Tanh", ["few"], ["bent"]),
        helper.make_node("MatMul", ["bent", "up"], ["fc1"]),
    ]
    save(path, nodes, constants, [("data", [batch, 3, side, side])], [("fc1", [1, length])])


def photo(rng, width, height):
    """Waves, fine stripes and blocks: something at every scale."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    planes = []
    for _ in range(3):
        fx, fy, phase = rng.uniform(0.02, 0.09, 2).tolist() + [rng.uniform(0, 6)]
        planes.append(128 + 70 * np.sin(fx * x + phase) * np.cos(fy * y) + 40 * ((x + y) % 3 == 0))
    picture = np.stack(planes, -1)
    for _ in range(8):
        left, top = rng.integers(0, width - 20), rng.integers(0, height - 20)
        picture[top : top + 18, left : left + 14] = rng.integers(0, 255, 3)
    return np.clip(picture, 0, 255).astype(np.uint8)[..., ::-1] // 4 * 4  # BGR, few values: small files


def is_clear_cut(model, picture, side):
    """Whether rounding (OpenCV resizes in fixed point) cannot change which candidates count."""
    near = lambda values, limit, margin: bool((np.abs(values - limit) < margin).any())
    model.det_thresh = 0.0
    model.nms_thresh = 1.0
    every, _ = model.detect(picture, input_size=(side, side))
    model.det_thresh, model.nms_thresh = THRESHOLD, 0.4
    counted = every[every[:, 4] >= THRESHOLD]
    kept, _ = model.detect(picture, input_size=(side, side))
    if near(every[:, 4], THRESHOLD, 4e-3):
        return False
    size = lambda low, high: np.maximum(0, high - low + 1)
    boxes = counted[:, None, :], counted[None, :, :]
    across = size(np.maximum(boxes[0][..., 0], boxes[1][..., 0]), np.minimum(boxes[0][..., 2], boxes[1][..., 2]))
    down = size(np.maximum(boxes[0][..., 1], boxes[1][..., 1]), np.minimum(boxes[0][..., 3], boxes[1][..., 3]))
    area = (counted[:, 2] - counted[:, 0] + 1) * (counted[:, 3] - counted[:, 1] + 1)
    overlap = across * down / (area[:, None] + area[None, :] - across * down)
    rivals = np.triu(overlap > 0.39, 1)
    if near((counted[:, None, 4] - counted[None, :, 4])[rivals], 0, 5e-3):
        return False
    return not near(overlap, 0.4, 2e-3) and 4 <= len(kept) and len(counted) >= len(kept) + 3


class Face(types.SimpleNamespace):
    """What insightface hands from model to model."""

    __setitem__ = setattr


def session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def rounded(array):
    return np.round(np.asarray(array, np.float64), 6).tolist()


def detections(scrfd, photos, cases):
    """Detectors and what they find; seeds are tried until nothing hangs on rounding."""
    expected = []
    for file, settings, side, pictures in cases:
        for seed in range(4000):
            detector(OUT / file, np.random.default_rng(seed), **settings)
            model = scrfd(str(OUT / file), session(OUT / file))
            if all(is_clear_cut(model, photos[name], side) for name in pictures):
                break
        else:
            raise SystemExit(f"{file}: no seed is clear cut")
        for name in pictures:
            boxes, points = model.detect(photos[name], input_size=(side, side))
            expected.append({"model": file, "photo": name, "side": side, "boxes": rounded(boxes), "points": rounded(points)})
    return expected


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--insightface", required=True, help="insightface-0.7.3.tar.gz from PyPI")
    scrfd, landmark, arcface = insightface(parser.parse_args().insightface)

    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    (OUT / "README.md").write_text(README)
    rng = np.random.default_rng(7)
    photos = {"wide.png": photo(rng, 150, 100), "high.png": photo(rng, 70, 110)}
    for name, picture in photos.items():
        cv2.imwrite(str(OUT / name), picture)

    pack = "antelopev2"
    levels = dict(strides=(8, 16, 32), anchors=2)
    cases = [
        (f"{pack}/scrfd_10g_bnkps.onnx", dict(levels, batched=False, side=None), 96, ["wide.png"]),
        ("batched.onnx", dict(levels, batched=True, side=128), 128, ["high.png"]),
        ("five_levels.onnx", dict(strides=(8, 16, 32, 64, 128), anchors=1, batched=False, side=None), 256, ["wide.png"]),
    ]
    expected = {"detections": detections(scrfd, photos, cases)}

    mixer(OUT / pack / "2d106det.onnx", rng, 192, 16, 212, [("bn_data", "Mul", 1 / 128)])
    mixer(OUT / "landmarks.onnx", rng, 192, 16, 212)
    mixer(OUT / pack / "1k3d68.onnx", rng, 192, 96, 3309, rank=1)
    mixer(OUT / pack / "genderage.onnx", rng, 96, 48, 3)
    mixer(OUT / pack / "glintr100.onnx", rng, 112, 8, 512)
    minus, times = ("_minusscalar0", "Sub", 127.5), ("_mulscalar0", "Mul", 1 / 128)
    mixer(OUT / "mxnet.onnx", rng, 112, 8, 512, [minus, times], batch=1)
    mixer(OUT / "curricularface.onnx", rng, 112, 8, 512, rank=4)

    # A face at an odd place, larger than the models' views, turned, and over the edge.
    faces = [
        {"photo": "wide.png", "box": [31.5, 12.25, 121.0, 140.75]},
        {"photo": "high.png", "box": [-6.0, 20.5, 41.25, 68.0]},
    ]
    turned = np.array([[0.31, 0.42], [0.66, 0.33], [0.54, 0.58], [0.41, 0.8], [0.72, 0.71]])
    expected["faces"] = []
    for face in faces:
        low, high = np.array(face["box"][:2]), np.array(face["box"][2:])
        points = (low + turned * (high - low)).astype(np.float32)
        record = dict(face, points=rounded(points), landmarks={}, embeddings={})
        for file in (f"{pack}/2d106det.onnx", "landmarks.onnx"):
            holder = Face(bbox=np.float32(face["box"]))
            holder.__class__.__setitem__ = lambda *_: None
            model = landmark(str(OUT / file), session(OUT / file))
            record["landmarks"][file] = rounded(model.get(photos[face["photo"]], holder))
        for file in (f"{pack}/glintr100.onnx", "mxnet.onnx", "curricularface.onnx"):
            model = arcface(str(OUT / file), session(OUT / file))
            holder = Face(kps=points)
            feature = model.get(photos[face["photo"]], holder)
            record["embeddings"][file] = rounded(feature / np.linalg.norm(feature))
        expected["faces"].append(record)
    (OUT / "expected.json").write_text(json.dumps(expected, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
