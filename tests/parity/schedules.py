"""Writes the learning rates of transformers' schedules, step by step.

    schedules.py OUT_DIR

The format is described in README.md beside this file; idempotent like make_fixtures.py.
"""

import argparse
import itertools
from pathlib import Path

from fixture_dir import once

LEARNING_RATE = 5e-5
WARMUPS, STEPS = (0, 1, 30), (1, 2, 100)


def variants():
    """Our keys, transformers' name of the schedule, and its own arguments."""
    for final in (0.0, 5e-6):
        ours = dict(schedule="cosine", final_learning_rate=final)
        yield (ours, "cosine", {}) if final == 0 else (ours, "cosine_with_min_lr", {"min_lr": final})
    yield dict(schedule="linear"), "linear", {}
    # Its linear schedule ends at 0; one that does not is a polynomial one.
    yield dict(schedule="linear", final_learning_rate=5e-6), "polynomial", {"power": 1.0, "lr_end": 5e-6}
    yield dict(schedule="constant"), "constant_with_warmup", {}
    for power, final in itertools.product((0.5, 1.0, 2.0, 3.5), (0.0, 1e-7, 1e-5)):
        ours = dict(schedule="polynomial", schedule_power=power, final_learning_rate=final)
        yield ours, "polynomial", {"power": power, "lr_end": final}


def rates(name, warmup, steps, arguments):
    """The rate that each step is taken with."""
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LEARNING_RATE)
    scheduler = get_scheduler(name, optimizer, warmup, steps, scheduler_specific_kwargs=arguments)
    taken = []
    for step in range(steps):
        if step > 0:
            optimizer.step()
            scheduler.step()
        taken.append(optimizer.param_groups[0]["lr"])
    return taken


def make():
    cases = []
    for (ours, name, arguments), warmup, steps in itertools.product(variants(), WARMUPS, STEPS):
        keys = dict(final_learning_rate=0.0, schedule_power=1.0) | ours
        cases.append({**keys, "warmup_steps": warmup, "steps": steps, "rates": rates(name, warmup, steps, arguments)})
    return {"learning_rate": LEARNING_RATE, "cases": cases}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory of the fixtures")
    once(parser.parse_args().out, [Path(__file__)], make)


if __name__ == "__main__":
    main()
