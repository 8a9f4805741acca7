"""A bench of burn-hyperlora as a child that measures on demand, and what a comparison with it prints."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path


class RustSide:
    """The bench; `command` starts it and is given the exchange folder, in which its files lie once this is made."""

    def __init__(self, command, exchange, threads):
        self.child = subprocess.Popen(
            [*command, str(exchange)],
            env={**os.environ, "RAYON_NUM_THREADS": str(threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.answer()

    def answer(self):
        line = self.child.stdout.readline()
        if not line:
            sys.exit(f"error: the Rust side ended with {self.child.wait()}")
        return json.loads(line)

    def run(self, **order):
        self.child.stdin.write(json.dumps(order) + "\n")
        self.child.stdin.flush()
        return self.answer()

    def close(self):
        self.child.stdin.close()
        if self.child.wait() != 0:
            sys.exit(f"error: the Rust side ended with {self.child.returncode}")


def cpu():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()
