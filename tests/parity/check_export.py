"""Loads exported models with transformers and compares their logits.

    check_export.py MODEL_DIR REFERENCE.safetensors [MODEL_DIR REFERENCE.safetensors ...]
                    [--tolerance 1e-5] [--save LOGITS.safetensors]

REFERENCE holds `ids` [B, T] and, when they are to be compared, `logits` [B, T, V]. One JSON line a model on
stdout says what was found; exit status 1 when a key is missing, unexpected or mismatched, when the
logits are further apart than the tolerance (largest absolute difference), or when a tokenizer that
is there does not load.
"""

import argparse
import json
import os
import sys
from pathlib import Path


def check(directory, path, tolerance, save):
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    reference = load_file(path)
    with torch.no_grad():
        logits_btv = model.eval()(input_ids=reference["ids"], use_cache=False).logits

    report = {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    good = not any(report.values())
    if "logits" in reference:
        wanted_btv = reference["logits"].float()
        same_shape = wanted_btv.shape == logits_btv.shape
        report["max_abs_diff"] = (wanted_btv - logits_btv).abs().max().item() if same_shape else None
        # A NaN compares false and so fails.
        good = good and same_shape and report["max_abs_diff"] <= tolerance
    if (directory / "tokenizer.json").exists():
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        report["tokenizer_size"] = len(tokenizer)
        good = good and len(tokenizer) <= model.config.vocab_size
    if save:
        save_file({"logits": logits_btv.contiguous()}, save)
    print(json.dumps({"ok": good, "model": directory.name, **report}))
    return good


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, nargs="+", help="directories of models, each with its reference")
    parser.add_argument("--tolerance", type=float, default=1e-5)
    parser.add_argument("--save", type=Path, help="write transformers' logits here, fp32")
    args = parser.parse_args()

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    transformers.logging.disable_progress_bar()
    pairs = zip(args.pairs[::2], args.pairs[1::2], strict=True)
    results = [check(directory, path, args.tolerance, args.save) for directory, path in pairs]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
