"""Speed and memory of the data pipeline beside plain Python, in alternating pairs, on the Python packages of this
checkout's virtual environment as a git repository.

    data.py [--pairs N] [--corpus DIR]... [--gigabytes N]

With `--corpus`, git repositories with a work tree take the place of the packages. `--gigabytes` sets the size of the
synthetic corpus whose memory is measured; 0 leaves that out. Markdown goes to stdout, progress to stderr.
"""

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "target/bench"
COORDINATOR = ROOT / "target/release/coordinator"
PACKAGES = ["torch", "transformers", "datasets", "peft", "accelerate", "pandas", "numpy", "sympy", "huggingface_hub"]


def say(text):
    print(text, file=sys.stderr, flush=True)


def run(command, **options):
    """Runs a program; its standard output, seconds, and the most memory it took."""
    began = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, **options)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status != 0:
        sys.exit(f"{command} ended with status {status}")
    return output, seconds, usage.ru_maxrss * 1024


def packages():
    """The Python packages of the virtual environment as a repository with a work tree."""
    corpus = BENCH / "packages"
    if (corpus / ".git/HEAD").exists():
        return corpus
    site = next((ROOT / ".venv/lib").glob("python*/site-packages"))
    for package in PACKAGES:
        ignore = shutil.ignore_patterns("*.so", "*.so.*", "*.a", "__pycache__", "*.pyc")
        shutil.copytree(site / package, corpus / package, ignore=ignore, dirs_exist_ok=True)
    git = ["git", "-C", corpus, "-c", "user.name=bench", "-c", "user.email=bench@example.invalid"]
    run([*git, "init", "--quiet"])
    run([*git, "add", "--all", "--force", "."])
    run([*git, "commit", "--quiet", "-m", "Packages"])
    return corpus


def synthetic(gigabytes):
    """A bare repository of so much text that no two files are alike."""
    corpus = BENCH / f"synthetic-{gigabytes}.git"
    if (corpus / "HEAD").exists():
        return corpus
    say(f"making a repository of {gigabytes} GiB")
    run(["git", "-c", "core.compression=0", "init", "--quiet", "--bare", corpus])
    importer = subprocess.Popen(
        ["git", "-C", corpus, "-c", "core.compression=0", "-c", "pack.compression=0", "fast-import", "--quiet"],
        stdin=subprocess.PIPE,
    )
    words = [f"name_{n}" for n in range(20_000)]
    draw = random.Random(0)
    out = importer.stdin
    out.write(b"commit refs/heads/master\ncommitter b <b@example.invalid> 1700000000 +0000\ndata 5\nbegin\n")
    written, number = 0, 0
    while written < gigabytes << 30:
        picked = draw.choices(words, k=1200)
        lines = (f"    {a} = {b}({c}, {number})\n" for a, b, c in zip(picked[::3], picked[1::3], picked[2::3]))
        text = f"def function_{number}():\n{''.join(lines)}".encode()
        path = f"d{number // 1000}/f{number}.py"
        out.write(f"M 100644 inline {path}\ndata {len(text)}\n".encode() + text + b"\n")
        written, number = written + len(text), number + 1
    out.close()
    if importer.wait() != 0:
        sys.exit("git fast-import failed")
    return corpus


def collect(repositories, *options):
    out = BENCH / "collected"
    shutil.rmtree(out, ignore_errors=True)
    command = [COORDINATOR, "collect", *repositories, "--out", out, "--validation-fraction", "0", "--json", *options]
    output, seconds, memory = run(command, stderr=subprocess.DEVNULL)
    manifest = json.loads(output)
    return sum(segment["rows"] for segment in manifest["train"]), seconds, memory, out


def collecting(repositories, pairs):
    ratios, ours, theirs, near = [], [], [], []
    for number in range(pairs + 1):
        rows, seconds, memory, _ = collect(repositories, "--duplicates", "keep")
        _, near_seconds, near_memory, _ = collect(repositories)
        shutil.rmtree(BENCH / "peer", ignore_errors=True)
        peer_rows, peer_seconds, peer_memory = 0, 0.0, 0
        for repository in repositories:
            command = [sys.executable, ROOT / "tests/bench/peer_collect.py", repository, BENCH / "peer"]
            output, took, memory_of = run(command)
            peer_rows, peer_seconds = peer_rows + json.loads(output)["rows"], peer_seconds + took
            peer_memory = max(peer_memory, memory_of)
        say(f"collect: ours {seconds:.2f} s for {rows} files, peer {peer_seconds:.2f} s for {peer_rows}")
        if number == 0:
            continue
        ours.append((rows / seconds, memory))
        theirs.append((peer_rows / peer_seconds, peer_memory))
        ratios.append(peer_seconds / seconds)
        near.append((rows / near_seconds, rows / max(near_seconds - seconds, 1e-3), near_memory))
    median = statistics.median
    print("\n| collecting | ours, files/s | plain Python, files/s | time ratio (of single pairs) | peak MB, ours | peak MB, peer |")
    print("| --- | --- | --- | --- | --- | --- |")
    print(f"| walk, filter, secrets, write | {median(o[0] for o in ours):,.0f} | {median(t[0] for t in theirs):,.0f} "
          f"| {median(ratios):.1f}x ({min(ratios):.1f}-{max(ratios):.1f}) | {max(o[1] for o in ours) / 1e6:,.0f} "
          f"| {max(t[1] for t in theirs) / 1e6:,.0f} |")
    out, took, _ = as_the_original(repositories)
    print(f"| the peer as the original's scripts gather rows, once | | {out / took:,.0f} | {took * median(o[0] for o in ours) / rows:.0f}x | | |")
    print(f"\nWith near-duplicates left out: {median(n[0] for n in near):,.0f} files/s in all; their removal alone "
          f"{median(n[1] for n in near):,.0f} files/s, peak {max(n[2] for n in near) / 1e6:,.0f} MB.")


def as_the_original(repositories):
    """Plain Python with a frame for each row: minutes."""
    say("collect: the peer with a frame for each row")
    rows, seconds, memory = 0, 0.0, 0
    for repository in repositories:
        shutil.rmtree(BENCH / "peer", ignore_errors=True)
        command = [sys.executable, ROOT / "tests/bench/peer_collect.py", repository, BENCH / "peer", "--grow"]
        output, took, memory_of = run(command)
        rows, seconds, memory = rows + json.loads(output)["rows"], seconds + took, max(memory, memory_of)
    return rows, seconds, memory


def packing(repositories, pairs):
    _, _, _, dataset = collect(repositories)
    tokenizer = BENCH / "tokenizer"
    if not (tokenizer / "tokenizer.json").exists():
        say("training a tokenizer")
        worker = ROOT / "target/release/worker"
        run([worker, "tokenizer", "train", "--dataset", dataset, "--vocab-size", "49152", "--out", tokenizer])
    ratios, ours, theirs = [], [], []
    for number in range(pairs + 1):
        command = [ROOT / "target/release/examples/pack_sequences", dataset, tokenizer]
        output, _, memory = run(command)
        mine = json.loads(output)
        command = [sys.executable, ROOT / "tests/bench/peer_pack.py", dataset, tokenizer / "tokenizer.json"]
        output, _, peer_memory = run(command)
        peer = json.loads(output)
        rates = [side["tokens"] / side["seconds"] for side in (mine, peer)]
        say(f"pack: ours {mine['seconds']:.1f} s ({mine['tokenise_seconds']:.1f} to tokenise), peer {peer['seconds']:.1f} s")
        if number == 0:
            continue
        ours.append((rates[0], memory))
        theirs.append((rates[1], peer_memory))
        ratios.append(rates[0] / rates[1])
    median = statistics.median
    print("\n| texts to sequences of 2,048 | ours, tokens/s | tokenizers + NumPy, tokens/s | ratio (of single pairs) | peak MB, ours | peak MB, peer |")
    print("| --- | --- | --- | --- | --- | --- |")
    print(f"| tokenise, infilling, pack | {median(o[0] for o in ours):,.0f} | {median(t[0] for t in theirs):,.0f} "
          f"| {median(ratios):.1f}x ({min(ratios):.1f}-{max(ratios):.1f}) | {max(o[1] for o in ours) / 1e6:,.0f} "
          f"| {max(t[1] for t in theirs) / 1e6:,.0f} |")


def memory(gigabytes):
    rows, seconds, peak, _ = collect([synthetic(gigabytes)])
    print(f"\nA synthetic repository of {gigabytes} GiB, {rows:,} files: {seconds:.0f} s ({rows / seconds:,.0f} files/s), "
          f"peak {peak / 1e6:,.0f} MB.")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--corpus", type=Path, action="append")
    parser.add_argument("--gigabytes", type=int, default=5)
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    BENCH.mkdir(parents=True, exist_ok=True)
    repositories = args.corpus or [packages()]
    collecting(repositories, args.pairs)
    packing(repositories, args.pairs)
    if args.gigabytes:
        memory(args.gigabytes)


main()
