"""A small CLIP tokenizer: the first part of the real CLIP BPE vocabulary, in the classic vocab.json/merges.txt layout.

    python ci/parity/clip_vocab.py --out crates/sdxl/src/tokenizer/merges.txt.gz

writes all merges of the real vocabulary, which the program brings along.

Source: `bpe_simple_vocab_16e6.txt.gz` of the open-clip-torch package (MIT licence, OpenAI CLIP and OpenCLIP authors).
"""

import argparse
import gzip
import importlib.util
import json
from pathlib import Path

MERGES = 1500
# What is left of CLIP's 49408 tokens without the bytes, the bytes at a word's end and the two specials.
ALL_MERGES = 49408 - 2 * 256 - 2
START, END = "<|startoftext|>", "<|endoftext|>"


def bytes_to_unicode() -> list[str]:
    """One printable character for each of the 256 bytes, in CLIP's order: `!` first, so `!` is token 0."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


def read_merges(count: int = MERGES) -> list[str]:
    """The first merges of the real vocabulary, most frequent first."""
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("the package open-clip-torch is missing: pip install --only-binary :all: --no-deps open-clip-torch==3.3.0")
    path = Path(package.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    return lines[1 : 1 + count]  # the first line is the version


def vocabulary() -> dict[str, int]:
    """Token to id: bytes, bytes at a word's end, merges, the two specials."""
    single = bytes_to_unicode()
    tokens = single + [token + "</w>" for token in single]
    tokens += ["".join(merge.split()) for merge in read_merges()]
    tokens += [START, END]
    return {token: index for index, token in enumerate(tokens)}


def write_tokenizer(folder: Path, pad_token: str) -> None:
    """Writes one tokenizer folder; SDXL's first tokenizer pads with the end token, its second with `!`."""
    folder.mkdir(parents=True, exist_ok=True)

    def special(content: str, normalized: bool) -> dict:
        return {"content": content, "lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False}

    specials = {"bos_token": special(START, True), "eos_token": special(END, True), "pad_token": pad_token}
    specials["unk_token"] = special(END, True)
    config = {
        "add_prefix_space": False,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": pad_token,
        "clean_up_tokenization_spaces": True,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
    }
    (folder / "vocab.json").write_text(json.dumps(vocabulary(), ensure_ascii=False) + "\n", encoding="utf-8")
    merges = "\n".join(["#version: 0.2", *read_merges()]) + "\n"
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(specials, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    text = "\n".join(read_merges(ALL_MERGES)) + "\n"
    parser.parse_args().out.write_bytes(gzip.compress(text.encode("utf-8"), compresslevel=9, mtime=0))


if __name__ == "__main__":
    main()
