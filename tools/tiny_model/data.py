# SPDX-License-Identifier: Apache-2.0
"""Build the corpus, the tokenizer and the token streams of the tiny model.

Two sources, both under the PSF licence: the Python standard library's own source files and the Python documentation in
reStructuredText. Every file is one document. About 2 % of the documents are held out, chosen by the SHA-256 of their
bytes, and are seen neither by the tokenizer's training nor by the model's. More source distributions (--extra, see
sources.txt) may be added to the training stream; the tokenizer and the held-out split do not change with them.

    python data.py --code <folder of the standard library> --docs <folder with *.rst.txt> --out <work folder> \
        --release <this folder> [--extra <folder with *.tar.gz source distributions>]

Writes to --out: train.bin and heldout.bin (uint16 token ids, documents as BOS ... EOS), tokenizer.json, data.json
(counts and hashes). Writes to --release: tokenizer.json, heldout.txt, heldout.jsonl (a sample of whole held-out
documents), data.json.
"""

import argparse
import hashlib
import json
import random
import tarfile
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 4096
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
BOS_ID, EOS_ID = 0, 1
HELDOUT_MODULUS = 50
MAX_FILE_BYTES = 300_000
MAIN_REPEATS = 2  # copies of the two main sources in a stream with --extra, so that they stay about a third of it

# Folders that are tests, caches, generated, or data tables rather than readable source.
SKIP_FOLDERS = {
    "test", "tests", "site-packages", "idlelib", "lib2to3", "encodings", "pydoc_data", "__pycache__", "ensurepip",
    "turtledemo",
}  # fmt: skip
SKIP_FILES = {"stringprep.py", "entities.py", "this.py"}


def read_documents(root: Path, suffix: str, prefix: str) -> list[tuple[str, str]]:
    """Read every suitable file below a folder.

    Args:
        root: folder to walk.
        suffix: how the file names end.
        prefix: put before the relative path, so that names from two roots cannot clash.

    Returns:
        (name, text) pairs, sorted by name.
    """
    found = []
    for path in sorted(root.rglob(f"*{suffix}")):
        relative = path.relative_to(root)
        if SKIP_FOLDERS & set(relative.parts[:-1]) or any(part.startswith("config-") for part in relative.parts):
            continue
        if path.name in SKIP_FILES or path.name.startswith("_sysconfigdata"):
            continue
        raw = path.read_bytes()
        if not 200 <= len(raw) <= MAX_FILE_BYTES:
            continue
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            continue
        found.append((f"{prefix}/{relative.as_posix()}", text))
    return found


def unpack(archives: Path, out: Path) -> list[Path]:
    """Unpack every source distribution (*.tar.gz) of a folder; returns the archives, sorted."""
    found = sorted(archives.glob("*.tar.gz"))
    for archive in found:
        with tarfile.open(archive) as file:
            file.extractall(out, filter="data")
    return found


def is_heldout(text: str) -> bool:
    """Say whether a document belongs to the held-out split; depends on its bytes only."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") % HELDOUT_MODULUS == 0


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer that adds no token by itself and round-trips every string."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Encode documents into one stream of uint16 ids, each as BOS, text, EOS."""
    parts = []
    for start in range(0, len(texts), 64):
        for encoding in tokenizer.encode_batch(texts[start : start + 64]):
            parts.append(np.array([BOS_ID, *encoding.ids, EOS_ID], dtype=np.uint16))
    return np.concatenate(parts)


def corpus_digest(documents: list[tuple[str, str]]) -> str:
    """SHA-256 over all documents in order: name, NUL, text, NUL."""
    digest = hashlib.sha256()
    for name, text in documents:
        digest.update(name.encode() + b"\0" + text.encode() + b"\0")
    return digest.hexdigest()


def choose_sample(heldout: list[tuple[str, str]], target_bytes: int) -> list[tuple[str, str]]:
    """Pick whole held-out documents, code and documentation in turn, of 3-40 KB each, up to about target_bytes."""
    by_kind = [
        [d for d in heldout if d[0].startswith(kind) and 3_000 <= len(d[1]) <= 40_000] for kind in ("code", "docs")
    ]
    sample: list[tuple[str, str]] = []
    num_bytes = 0
    for pair in zip(*by_kind, strict=False):
        for name, text in pair:
            if num_bytes + len(text.encode()) <= target_bytes:
                sample.append((name, text))
                num_bytes += len(text.encode())
    return sample


def main() -> None:
    """Run the whole preparation and print what was counted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--code", type=Path, required=True, help="folder of the Python standard library")
    parser.add_argument("--docs", type=Path, required=True, help="folder with the documentation's *.rst.txt")
    parser.add_argument("--out", type=Path, required=True, help="work folder for the token streams")
    parser.add_argument("--release", type=Path, required=True, help="folder for tokenizer.json and the held-out sample")
    parser.add_argument("--extra", type=Path, help="folder with source distributions (*.tar.gz), for training only")
    parser.add_argument("--sample-bytes", type=int, default=125_000)
    args = parser.parse_args()
    for folder in (args.out, args.release):
        folder.mkdir(parents=True, exist_ok=True)

    documents = read_documents(args.code, ".py", "code") + read_documents(args.docs, ".rst.txt", "docs")
    seen: set[str] = set()
    documents = [d for d in documents if not (d[1] in seen or seen.add(d[1]))]
    heldout = [d for d in documents if is_heldout(d[1])]
    train = [d for d in documents if not is_heldout(d[1])]
    random.Random(0).shuffle(train)
    random.Random(0).shuffle(heldout)

    tokenizer = train_tokenizer([text for _, text in train])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    assert [tokenizer.token_to_id(t) for t in (BOS, EOS, PAD)] == [0, 1, 2]
    for _, text in heldout:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text, "tokenizer does not round-trip"

    extra: list[tuple[str, str]] = []
    archives: list[Path] = []
    if args.extra:
        archives = unpack(args.extra, args.out / "extra")
        for suffix in (".py", ".rst", ".txt"):
            found = read_documents(args.out / "extra", suffix, "extra")
            extra += [d for d in found if not (d[1] in seen or seen.add(d[1])) and not is_heldout(d[1])]
        random.Random(1).shuffle(extra)

    repeats = MAIN_REPEATS if extra else 1
    train_ids = encode(tokenizer, [text for _, text in train * repeats + extra])
    heldout_ids = encode(tokenizer, [text for _, text in heldout])
    train_ids.tofile(args.out / "train.bin")
    heldout_ids.tofile(args.out / "heldout.bin")
    sample = choose_sample(heldout, args.sample_bytes)
    for folder in (args.out, args.release):
        tokenizer.save(str(folder / "tokenizer.json"))
    (args.release / "heldout.txt").write_text("".join(text for _, text in sample), encoding="utf-8", newline="")
    lines = [json.dumps({"path": name, "text": text}, ensure_ascii=False) for name, text in sample]
    (args.release / "heldout.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="")

    def num_bytes(kind: str, split: list[tuple[str, str]]) -> int:
        return sum(len(text.encode()) for name, text in split if name.startswith(kind))

    facts = {
        "num_documents_train": len(train),
        "num_documents_heldout": len(heldout),
        "num_bytes_train": {"code": num_bytes("code", train), "docs": num_bytes("docs", train)},
        "num_bytes_heldout": {"code": num_bytes("code", heldout), "docs": num_bytes("docs", heldout)},
        "main_repeats": repeats,
        "num_documents_extra": len(extra),
        "num_bytes_extra": sum(len(text.encode()) for _, text in extra),
        "sha256_extra": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in archives},
        "num_tokens_train": int(train_ids.size),
        "num_tokens_heldout": int(heldout_ids.size),
        "sample_documents": len(sample),
        "sample_bytes": sum(len(text.encode()) for _, text in sample),
        "sha256_train": corpus_digest(sorted(train)),
        "sha256_heldout": corpus_digest(sorted(heldout)),
        "sha256_tokenizer": hashlib.sha256((args.release / "tokenizer.json").read_bytes()).hexdigest(),
    }
    for folder in (args.out, args.release):
        (folder / "data.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
