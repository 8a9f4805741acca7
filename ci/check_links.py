#!/usr/bin/env python3
"""Checks that every local link in the Markdown files resolves, and that comments name only docs pages that exist.

    ci/check_links.py        prints file:line and the reason of each dead link, and exits with 1 if there is one

Links to other hosts are not followed: a test must not depend on them.
"""
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)|^\s*\[[^\]]+\]:\s*<?([^\s>]+)>?")
HEADING = re.compile(r"#{1,6}\s+(.*?)\s*#*\s*$")
CODE_SPAN = re.compile(r"`[^`]*`")
DOCS_PATH = re.compile(r"(?<![\w/.-])docs/[\w./-]*\w(?:#[\w-]+)?")
COMMENTED = (".rs", ".yaml", ".yml", ".sh", ".py", ".toml", ".sbatch", "Containerfile")


def tracked():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def prose(path):
    """Yields (number, line) outside of fenced code."""
    fence = None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        mark = re.match(r"\s*(```+|~~~+)", line)
        if mark and fence is None:
            fence = mark[1]
        elif mark and mark[1].startswith(fence):
            fence = None
        elif fence is None:
            yield number, line


def anchors(path, known={}):
    """The anchors that GitHub gives the headings of a page."""
    if path not in known:
        slugs = known[path] = set()
        for _, line in prose(path):
            heading = HEADING.match(line)
            if heading:
                text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).lower()
                slug = unique = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
                count = 0
                while unique in slugs:
                    count += 1
                    unique = f"{slug}-{count}"
                slugs.add(unique)
    return known[path]


def problem(target, folder):
    """Why a link that starts at `folder` leads nowhere; None if it resolves."""
    name, _, anchor = unquote(target).partition("#")
    path = (folder / name).resolve() if name else folder
    if not path.is_relative_to(ROOT):
        return "leads out of the repository"
    if not path.exists():
        return "does not exist"
    if anchor and path.suffix == ".md" and anchor not in anchors(path):
        return "has no such heading"
    return None


def dead_links(files):
    for name in files:
        path = ROOT / name
        if name.endswith(".md"):
            for number, line in prose(path):
                for match in LINK.finditer(CODE_SPAN.sub("", line)):
                    target = match[1] or match[2]
                    if not re.match(r"[a-z][a-z0-9+.-]*:", target, re.IGNORECASE):
                        start = path if target.startswith("#") else path.parent
                        reason = problem(target, start)
                        if reason:
                            yield f"{name}:{number}: {target} {reason}"
        elif name.endswith(COMMENTED) and path != Path(__file__).resolve():
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                for match in DOCS_PATH.finditer(line):
                    reason = problem(match[0], ROOT)
                    if reason:
                        yield f"{name}:{number}: {match[0]} {reason}"


def main():
    found = list(dead_links(tracked()))
    print("\n".join(found) if found else "all local links resolve")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
