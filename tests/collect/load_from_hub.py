"""Loads a dataset of a hub by its name and prints the number of rows of each split, as JSON."""

import json
import sys

from datasets import load_dataset

print(json.dumps({split: len(rows) for split, rows in load_dataset(sys.argv[1]).items()}))
