"""Runs two training programs step by step in alternation and compares their throughput.

    driver.py --name NAME --ours 'CMD ...' --peer 'CMD ...' [--pairs 5] [--warmup 1] [--json FILE]

Both programs speak the protocol of peer.py. They stay up together and take turns, so a machine
that slows down slows both. The ratio is that of the medians. A Markdown table row goes to stdout,
progress to stderr.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from pathlib import Path


class Program:
    """One side of the comparison."""

    def __init__(self, label, command):
        self.label = label
        self.command = command
        self.process = subprocess.Popen(
            shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.ready = self.read()
        self.steps = []

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.label} ended with status {self.process.wait()} before it answered: {self.command}")
        return json.loads(line)

    def step(self):
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        reply = self.read()
        self.steps.append(reply)
        return reply

    def close(self):
        self.process.stdin.close()
        if self.process.wait() != 0:
            sys.exit(f"{self.label} ended with status {self.process.returncode}")

    def summary(self, warmup):
        steps = self.steps[warmup:]
        device = [step.get("peak_device_bytes") for step in steps]
        return {
            "command": self.command,
            "parameters": self.ready.get("parameters"),
            "tokens_per_second": statistics.median(step["tokens"] / step["seconds"] for step in steps),
            "seconds": [step["seconds"] for step in steps],
            "losses": [step["loss"] for step in self.steps],
            "start_rss_bytes": self.ready.get("rss_bytes"),
            "peak_rss_bytes": max(step["peak_rss_bytes"] for step in steps),
            "peak_device_bytes": max(device) if None not in device else None,
        }


def machine():
    """What the figures depend on."""
    model = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "system": platform.platform()}


def megabytes(summary):
    key = "peak_device_bytes" if summary["peak_device_bytes"] is not None else "peak_rss_bytes"
    return f"{summary[key] / 1e6:,.0f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="first column of the table row")
    parser.add_argument("--ours", required=True, help="command of our program")
    parser.add_argument("--peer", required=True, help="command of the peer")
    parser.add_argument("--pairs", type=int, default=5, help="timed pairs")
    parser.add_argument("--warmup", type=int, default=1, help="pairs that are not timed")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()

    programs = [Program("ours", args.ours), Program("peer", args.peer)]
    ours, peer = programs
    if ours.ready.get("parameters") != peer.ready.get("parameters"):
        sys.exit(f"not the same model: ours {ours.ready}, peer {peer.ready}")
    for pair in range(args.warmup + args.pairs):
        # Who goes first changes, so that neither always follows the other.
        replies = {program.label: program.step() for program in programs[:: 1 if pair % 2 == 0 else -1]}
        if replies["ours"]["tokens"] != replies["peer"]["tokens"]:
            sys.exit(f"not the same step: {replies}")
        seconds = {label: reply["seconds"] for label, reply in replies.items()}
        phase = "warm-up" if pair < args.warmup else f"pair {pair - args.warmup + 1}/{args.pairs}"
        ratio = seconds["peer"] / seconds["ours"]
        print(f"{args.name}: {phase}: ours {seconds['ours']:.3f} s, peer {seconds['peer']:.3f} s, {ratio:.2f}x",
              file=sys.stderr)
    for program in programs:
        program.close()

    ours, peer = ours.summary(args.warmup), peer.summary(args.warmup)
    ratio = ours["tokens_per_second"] / peer["tokens_per_second"]
    pairs = [theirs / own for own, theirs in zip(ours["seconds"], peer["seconds"])]
    result = {"name": args.name, "ratio": ratio, "pair_ratios": pairs, "ours": ours, "peer": peer, "machine": machine()}
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    print(f"| {args.name} | {ours['tokens_per_second']:,.0f} | {peer['tokens_per_second']:,.0f} "
          f"| {ratio:.2f}x ({min(pairs):.2f}-{max(pairs):.2f}) | {megabytes(ours)} | {megabytes(peer)} |", flush=True)


if __name__ == "__main__":
    main()
