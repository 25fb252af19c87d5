#!/usr/bin/env python3
"""Logs a job's metrics.jsonl as a run of Weights & Biases: `to_wandb.py OUTPUT --project NAME`, with `pip install wandb`.

What an attempt made again replaces what was logged of those steps before. With --follow it goes on until the job has ended,
and may be started again at any time: the run has the job's name, and steps that it has are left out. Without a network,
set WANDB_MODE=offline, and upload the run's directory later by `wandb sync`.
"""

import argparse
import json
import pathlib
import time

# What W&B calls the values of a line.
PREFIX = {"step": "train/", "eval": "eval/", "save": "checkpoint/"}
ABOUT = {"kind", "attempt", "event", "unix_ms", "step", "path"}


def lines(path, follow):
    """Whole lines as they come; a line that is being written is waited for."""
    rest = ""
    with path.open(encoding="utf-8") as file:
        while True:
            text = file.readline()
            if text.endswith("\n"):
                yield json.loads(rest + text)
                rest = ""
            elif text:
                rest += text
            elif follow:
                yield None
                time.sleep(5)
            else:
                return


def values(line):
    prefix = PREFIX[line["kind"]]
    found = {prefix + key: value for key, value in line.items() if key not in ABOUT and value is not None}
    return {**found, "attempt": line["attempt"], "unix_ms": line["unix_ms"]}


def history(path):
    """For each step its values, in order: those of the last attempt that made it."""
    steps = {}
    attempt = None
    for line in lines(path, follow=False):
        if line["attempt"] != attempt:
            attempt = line["attempt"]
            if line["kind"] == "step":
                steps = {step: known for step, known in steps.items() if step < line["step"]}
        steps.setdefault(line["step"], {}).update(values(line))
    return sorted(steps.items())


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("output", type=pathlib.Path, help="the job's output directory")
    arguments.add_argument("--project", required=True)
    arguments.add_argument("--name", help="of the run; the output directory's name when absent")
    arguments.add_argument("--follow", action="store_true", help="go on with what the job logs, until interrupted")
    args = arguments.parse_args()
    log = args.output / "metrics.jsonl"
    if not log.exists():
        arguments.error(f"{log} is not there: name the output directory of a job")

    import wandb

    name = args.name or args.output.resolve().name
    attempts = sorted((args.output / "logs").glob("attempt-*/job.json"), key=lambda path: path.stat().st_mtime)
    config = json.loads(attempts[-1].read_text()) if attempts else {}
    run = wandb.init(project=args.project, id=name, name=name, resume="allow", config=config, dir=args.output)
    logged = run.step
    for step, found in history(log):
        if step >= logged:
            run.log(found, step=step)
    if args.follow:
        known = max((step for step, _ in history(log)), default=0)
        for line in lines(log, follow=True):
            if line is not None and line["step"] > known:
                run.log(values(line), step=line["step"])
    run.finish()


if __name__ == "__main__":
    main()
