#!/usr/bin/env python3
"""Reads a shard folder with pyarrow and checks types and values: python ci/parity/check_shards.py DIR

What docs/reference/formats.md promises to readers in other languages is asserted here, without a line of the Rust code.
Needs pyarrow, numpy and Pillow.
"""

import hashlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

POINTS_68_OR_106 = (2 * 68, 2 * 106)


def floats(length: int = -1) -> pa.DataType:
    return pa.list_(pa.field("element", pa.float32(), nullable=False), length)


SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("width", pa.uint32(), nullable=False),
        pa.field("height", pa.uint32(), nullable=False),
        pa.field("face_box", floats(4), nullable=False),
        pa.field("points", floats(10), nullable=False),
        pa.field("landmarks", floats(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
        pa.field("id_embedding", floats(512), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("identity", pa.string()),
        pa.field("split", pa.string()),
    ]
)


def check_row(row: dict) -> None:
    key = row["key"]
    image = Image.open(io.BytesIO(row["image"]))
    assert image.format == "PNG" and image.mode == "RGB", (key, image.format, image.mode)
    assert image.size == (row["width"], row["height"]), key
    image.load()

    x0, y0, x1, y1 = row["face_box"]
    assert x0 < x1 and y0 < y1, (key, row["face_box"])
    points = np.array(row["points"]).reshape(5, 2)
    left_eye, right_eye, nose, left_mouth, right_mouth = points
    assert left_eye[0] < right_eye[0] and left_mouth[0] < right_mouth[0], (key, "left is the viewer's")
    assert max(left_eye[1], right_eye[1]) < min(left_mouth[1], right_mouth[1]), (key, "eyes above the mouth")

    assert len(row["landmarks"]) in POINTS_68_OR_106, (key, len(row["landmarks"]))
    landmarks = np.array(row["landmarks"]).reshape(-1, 2)
    slack = 0.25 * max(x1 - x0, y1 - y0)
    inside = (landmarks > [x0 - slack, y0 - slack]) & (landmarks < [x1 + slack, y1 + slack])
    assert inside.all(), (key, "landmarks far outside the face box")

    embedding = np.array(row["id_embedding"])
    assert abs(np.linalg.norm(embedding) - 1.0) < 1e-4, (key, np.linalg.norm(embedding))
    assert 0.0 < row["score"] <= 1.0, key
    assert row["caption"].strip(), key
    assert len(row["sha256"]) == 64 and set(row["sha256"]) <= set("0123456789abcdef"), key


def same_person_is_closer(rows: list[dict]) -> str:
    known = [row for row in rows if row["identity"] is not None]
    names = np.array([row["identity"] for row in known])
    if len(set(names)) < 2 or len(set(names)) == len(names):
        return "too few identities to compare"
    embeddings = np.array([row["id_embedding"] for row in known])
    likeness = embeddings @ embeddings.T
    same = names[:, None] == names[None, :]
    different = likeness[~same].mean()
    np.fill_diagonal(same, False)
    same = likeness[same].mean()
    assert same > different + 0.3, (same, different)
    return f"cosine of the same person {same:.3f}, of others {different:.3f}"


def main(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["schema_version"] == 2
    rows = []
    for shard in manifest["shards"]:
        path = folder / shard["file"]
        content = path.read_bytes()
        assert len(content) == shard["bytes"] and hashlib.sha256(content).hexdigest() == shard["sha256"], path
        file = pq.ParquetFile(path)
        assert file.schema_arrow.remove_metadata().equals(SCHEMA), file.schema_arrow
        assert file.metadata.metadata[b"hyperlora.schema_version"] == b"2"
        assert file.metadata.created_by == "hyperlora data-prep"
        assert file.num_row_groups == len(shard["row_groups"]), path
        for group, place in enumerate(shard["row_groups"]):
            end = place["offset"] + place["bytes"]
            assert hashlib.sha256(content[place["offset"] : end]).hexdigest() == place["sha256"], (path, group)
            assert file.metadata.row_group(group).num_rows == place["rows"], (path, group)
            for column in range(file.metadata.num_columns):
                assert file.metadata.row_group(group).column(column).compression == "ZSTD"
        assert hashlib.sha256(content[end:]).hexdigest() == shard["footer_sha256"], path
        table = file.read()
        assert table.num_rows == shard["rows"], path
        rows += table.to_pylist()

    assert len(rows) == manifest["kept"]
    assert manifest["photos"] == manifest["kept"] + sum(manifest["rejected"].values())
    index = folder / manifest["index"]["file"]
    content = index.read_bytes()
    assert len(content) == manifest["index"]["bytes"]
    assert hashlib.sha256(content).hexdigest() == manifest["index"]["sha256"]
    labels = [{name: row[name] for name in ("key", "identity", "split")} for row in rows]
    assert pq.read_table(index).to_pylist() == labels, "the index repeats the rows' labels"
    keys = [row["key"] for row in rows]
    assert keys == sorted(set(keys), key=str.encode), "keys are unique and in order"
    assert len({row["sha256"] for row in rows}) == len(rows), "no photo twice"
    splits = [row["split"] for row in rows if row["split"] is not None]
    assert manifest["splits"] == {name: splits.count(name) for name in set(splits)}
    for row in rows:
        check_row(row)
    print(f"{len(rows)} faces in {len(manifest['shards'])} shards as documented; {same_person_is_closer(rows)}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
