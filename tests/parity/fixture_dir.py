"""A directory of fixtures that is made once, and again when what makes it has changed."""

import fcntl
import hashlib
import json
import logging
import os
import shutil
from importlib.metadata import version
from pathlib import Path


def once(out, sources, make):
    """Calls `make()`, which fills the empty directory `out` and returns the rest of its index, unless it is current.

    `sources` are the files whose content decides it; concurrent calls wait for the first.
    """
    packages = {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}
    text = b"".join(path.read_bytes() for path in [*sources, Path(__file__)]) + json.dumps(packages).encode()
    generator = hashlib.sha256(text).hexdigest()
    index = out / "index.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.with_name(out.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if index.exists() and json.loads(index.read_text())["generator"] == generator:
            return
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        # bitsandbytes would compile its fallbacks anew for every shape, with the same results.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        # It says on import that an optional package is not there.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        import torch

        torch.set_num_threads(1)  # the sum of a mean depends on it
        partial = index.with_suffix(".partial")
        partial.write_text(json.dumps({"generator": generator, "versions": packages, **make()}, indent=1) + "\n")
        partial.rename(index)
