"""How long an editor waits for a line from `worker serve` on a GPU, on a model of random weights.

    serve_gpu.py MODEL [--requests N] [--line N] [-- FLAGS OF worker serve ...]

A line is LINE tokens after a prompt of 1,500 tokens that nobody asked before, and again after one more token of it, whose
context is kept. Prompts are random tokens. A row of Markdown goes to stdout.
"""

import argparse
import random
import statistics
from pathlib import Path

from serve import CONTEXT, Ours, say


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--requests", type=int, default=15)
    parser.add_argument("--line", type=int, default=16)
    parser.add_argument("--name", default="model")
    parser.add_argument("flags", nargs="*")
    args = parser.parse_args()
    draw = random.Random(5)
    ours = Ours(args.model, *args.flags)
    fresh, kept, token = [], [], []
    try:
        for number in range(args.requests + 2):
            prompt = [draw.randrange(5, 40000) for _ in range(CONTEXT)]
            first, took, made = ours.complete(prompt, args.line)
            again_first, again, _ = ours.complete([*prompt, 7], args.line)
            say(f"line {took * 1000:.0f} ms, first token {first * 1000:.0f} ms; again {again * 1000:.0f} ms")
            if number >= 2 and made == args.line:  # the first ones warm up; none may end early
                fresh.append(took * 1000)
                kept.append(again * 1000)
                token.append((again - again_first) / (made - 1) * 1000)
    finally:
        ours.process.kill()
    worst = lambda values: sorted(values)[int(0.95 * (len(values) - 1))]
    shown = [f"{statistics.median(values):.0f} ({worst(values):.0f})" for values in (fresh, kept)]
    print(f"| {args.name} | {len(fresh)} | {shown[0]} | {shown[1]} | {statistics.median(token):.1f} |")


if __name__ == "__main__":
    main()
