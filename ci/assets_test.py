"""Tests of assets.py against a registry on loopback that is not to be trusted.

    python3 -B ci/assets_test.py
"""

import base64
import contextlib
import gzip
import hashlib
import http.server
import io
import json
import os
import sys
import tarfile
import tempfile
import threading
import unittest
import zipfile
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "launch"))
import assets

SETTINGS = ("PIP_INDEX_URL", "PIP_CERT", "NPM_CONFIG_REGISTRY")


def tar_of(files):
    """A source distribution with these members; content None makes a link to a file of the system."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/hostname"
            else:
                member.size = len(content)
            archive.addfile(member, io.BytesIO(content or b""))
    return packed.getvalue()


def package(content, file="thing-1.0.tar.gz", registry="pypi", pinned=None):
    pin = hashlib.sha256(content if pinned is None else pinned).hexdigest()
    return assets.Package(registry, "thing", "1.0", file, len(content), pin, "a test")


class Server(http.server.ThreadingHTTPServer):
    """Answers as `pages` says: path -> (type, content), or where to go on."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages, self.asked = {}, []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def url(self, path, login=""):
        return f"http://{login}127.0.0.1:{self.server_port}{path}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        page = self.server.pages.get(self.path)
        if isinstance(page, str):
            self.send_response(302)
            self.send_header("Location", page)
            self.end_headers()
            return
        self.send_response(200 if page else 404)
        kind, content = page or ("text/plain", b"")
        self.send_header("Content-Type", kind)
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(content)

    def log_message(self, *_):
        pass


class Assets(unittest.TestCase):
    def setUp(self):
        self.server = Server()
        self.addCleanup(self.server.server_close)
        self.addCleanup(self.server.shutdown)
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.cache = Path(folder.name)
        self.configure(PIP_INDEX_URL=self.server.url("/simple"), NPM_CONFIG_REGISTRY=self.server.url("/npm/"))
        quiet = contextlib.redirect_stdout(io.StringIO())
        quiet.__enter__()
        self.addCleanup(quiet.__exit__, None, None, None)

    def configure(self, **settings):
        kept = {name: value for name, value in os.environ.items() if name not in SETTINGS and "proxy" not in name.lower()}
        patch = mock.patch.dict(os.environ, {**kept, **settings}, clear=True)
        patch.start()
        self.addCleanup(patch.stop)

    def serve(self, content, file="thing-1.0.tar.gz"):
        listed = {"files": [{"filename": file, "url": f"../../files/{file}"}]}
        self.server.pages["/simple/thing/"] = ("application/vnd.pypi.simple.v1+json", json.dumps(listed).encode())
        self.server.pages[f"/files/{file}"] = ("application/octet-stream", content)

    def refused(self, words, package):
        with self.assertRaises(assets.Stop) as raised:
            assets.fetch(package, self.cache)
        self.assertIn(words, str(raised.exception))
        self.assertEqual(list((self.cache / "packages").iterdir()), [])
        return str(raised.exception)

    def test_nothing_of_a_package_is_executed_before_its_checksum_or_after(self):
        ran = self.cache / "ran"
        setup = f"open({str(ran)!r}, 'w')\nfrom setuptools import setup\nsetup(name='thing', version='1.0')\n"
        content = tar_of({"thing-1.0/setup.py": setup.encode(), "thing-1.0/a.jpg": b"a photo"})
        self.serve(content)
        self.refused("SHA-256 does not match", package(content, pinned=b"another"))
        whole = package(content)
        path = assets.fetch(whole, self.cache)
        wanted = [assets.Asset("a.jpg", whole, "thing-1.0/a.jpg", hashlib.sha256(b"a photo").hexdigest())]
        assets.unpack(whole, path, wanted, self.cache)
        self.assertEqual((self.cache / "a.jpg").read_bytes(), b"a photo")
        self.assertFalse(ran.exists())

    def test_an_index_may_answer_in_html(self):
        content = b"a wheel"
        self.serve(content)
        link = '<a href="../../files/thing-1.0.tar.gz#sha256=00">thing-1.0.tar.gz</a>'
        self.server.pages["/simple/thing/"] = ("text/html", f"<a>x</a>{link}".encode())
        self.assertEqual(assets.fetch(package(content), self.cache).read_bytes(), content)

    def test_a_registry_of_npm_is_asked_for_the_file_alone(self):
        self.server.pages["/npm/thing/-/thing-1.0.tgz"] = ("application/octet-stream", b"a package")
        assets.fetch(package(b"a package", "thing-1.0.tgz", "npm"), self.cache)
        self.assertEqual([path for path, _ in self.server.asked], ["/npm/thing/-/thing-1.0.tgz"])

    def test_what_is_longer_than_its_pin_is_not_downloaded_to_its_end(self):
        self.serve(b"x" * (8 << 20))
        self.refused("holds more than 9 bytes", package(b"x" * 9))

    def test_a_login_goes_to_the_registry_alone_and_into_no_message(self):
        elsewhere = Server()
        self.addCleanup(elsewhere.server_close)
        self.addCleanup(elsewhere.shutdown)
        elsewhere.pages["/file"] = ("application/octet-stream", b"a file")
        self.serve(b"a file")
        self.server.pages["/files/thing-1.0.tar.gz"] = f"http://localhost:{elsewhere.server_port}/file"
        self.configure(PIP_INDEX_URL=self.server.url("/simple", "me:s%40cret@"))
        assets.fetch(package(b"a file"), self.cache)
        login = "Basic " + base64.b64encode(b"me:s@cret").decode()
        self.assertEqual([sent for _, sent in self.server.asked], [login, login])
        self.assertEqual(elsewhere.asked, [("/file", None)])
        (self.cache / "packages").rename(self.cache / "before")
        self.server.pages.clear()
        said = self.refused("404", package(b"a file"))
        self.assertNotIn("cret", said)

    def test_only_the_web_is_fetched_from(self):
        secret = self.cache / "secret"
        secret.write_bytes(b"secret")
        listed = {"files": [{"filename": "thing-1.0.tar.gz", "url": secret.as_uri()}]}
        self.server.pages["/simple/thing/"] = ("application/vnd.pypi.simple.v1+json", json.dumps(listed).encode())
        self.refused("no place to fetch a file from", package(b"secret"))
        for listed in (b"[]", b"{", b'{"files": [{"filename": 1}]}', b'{"files": []}'):
            self.server.pages["/simple/thing/"] = ("application/vnd.pypi.simple.v1+json", listed)
            self.refused("does not list", package(b"secret"))

    def test_members_are_bounded_and_files(self):
        with mock.patch.object(assets, "LARGEST_MEMBER", 1000):
            bomb = tar_of({"bomb": b"\0" * 100_000, "link": None})
            path = self.cache / "bomb.tar.gz"
            path.write_bytes(bomb)
            whole = package(bomb)
            for member, words in (("bomb", "more than 1000 bytes"), ("link", "is no file"), ("none", "none")):
                with self.assertRaisesRegex(assets.Stop, words):
                    assets.unpack(whole, path, [assets.Asset("out", whole, member, "")], self.cache)
            wheel = self.cache / "bomb.whl"
            with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("bomb", b"\0" * 100_000)
            whole = package(b"", "bomb-1.0-py3-none-any.whl")
            with self.assertRaisesRegex(assets.Stop, "more than 1000 bytes"):
                assets.unpack(whole, wheel, [assets.Asset("out", whole, "bomb", "")], self.cache)
            wheel.write_bytes(gzip.compress(b"no wheel"))
            with self.assertRaisesRegex(assets.Stop, "not laid out"):
                assets.unpack(whole, wheel, [assets.Asset("out", whole, "bomb", "")], self.cache)
        self.assertFalse((self.cache / "out").exists())


if __name__ == "__main__":
    unittest.main()
