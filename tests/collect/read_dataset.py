"""Prints the rows of a dataset's training split, as `datasets` reads them: one JSON object a line."""

import json
import sys
from pathlib import Path

from datasets import load_dataset

directory, kind = Path(sys.argv[1]), sys.argv[2]
files = sorted(str(path) for path in directory.glob(f"train-*.{kind}"))
cache = sys.argv[3]
for row in load_dataset(kind, data_files={"train": files}, split="train", cache_dir=cache):
    print(json.dumps({key: row[key] for key in ("repo_id", "file_path", "content", "commit", "size_bytes")}))
