"""Loads an exported model with transformers and compares its logits.

    check_export.py MODEL_DIR REFERENCE.safetensors [--tolerance 1e-5] [--save LOGITS.safetensors]

REFERENCE holds `ids` [B, T] and, when they are to be compared, `logits` [B, T, V]. One JSON line on
stdout says what was found; exit status 1 when a key is missing, unexpected or mismatched, when the
logits are further apart than the tolerance (largest absolute difference), or when a tokenizer that
is there does not load.
"""

import argparse
import json
import os
import sys
from pathlib import Path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("reference", type=Path)
    parser.add_argument("--tolerance", type=float, default=1e-5)
    parser.add_argument("--save", type=Path, help="write transformers' logits here, fp32")
    args = parser.parse_args()

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    transformers.logging.disable_progress_bar()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    reference = load_file(args.reference)
    with torch.no_grad():
        logits_btv = model.eval()(input_ids=reference["ids"], use_cache=False).logits

    report = {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    good = not any(report.values())
    if "logits" in reference:
        wanted_btv = reference["logits"].float()
        same_shape = wanted_btv.shape == logits_btv.shape
        report["max_abs_diff"] = (wanted_btv - logits_btv).abs().max().item() if same_shape else None
        # A NaN compares false and so fails.
        good = good and same_shape and report["max_abs_diff"] <= args.tolerance
    if (args.model / "tokenizer.json").exists():
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
        report["tokenizer_size"] = len(tokenizer)
        good = good and len(tokenizer) <= model.config.vocab_size
    if args.save:
        save_file({"logits": logits_btv.contiguous()}, args.save)
    print(json.dumps({"ok": good, **report}))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
