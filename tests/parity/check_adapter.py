"""Loads adapters with PEFT on their base and compares their logits.

    check_adapter.py MODEL_DIR ADAPTER_DIR REFERENCE.safetensors [ADAPTER_DIR REFERENCE.safetensors ...]

REFERENCE holds `ids` [B, T] and `logits` [B, T, V]. One JSON line per adapter on stdout says what was
found; exit status 1 when a key is missing or unexpected, when PEFT warns, or when logits are further
apart than 1e-5 (largest absolute difference).
"""

import argparse
import json
import os
import sys
import warnings
from pathlib import Path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("pairs", type=Path, nargs="+")
    parser.add_argument("--tolerance", type=float, default=1e-5)
    args = parser.parse_args()

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    import transformers
    from peft import PeftConfig, get_peft_model
    from safetensors.torch import load_file

    transformers.logging.disable_progress_bar()
    all_good = True
    for adapter, reference in zip(args.pairs[::2], args.pairs[1::2], strict=True):
        base = transformers.AutoModelForCausalLM.from_pretrained(
            args.model, dtype=torch.float32, attn_implementation="eager"
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = get_peft_model(base, PeftConfig.from_pretrained(adapter))
            loaded = model.load_adapter(adapter, "default")
        wanted = load_file(reference)
        with torch.no_grad():
            logits_btv = model.eval()(input_ids=wanted["ids"], use_cache=False).logits
        difference = (wanted["logits"].float() - logits_btv).abs().max().item()
        messages = [str(w.message) for w in caught]
        expected = {k for k in model.state_dict() if any(part in k for part in ("lora_", "modules_to_save", "trainable_tokens_delta"))}
        report = {
            "missing": sorted(expected & set(loaded.missing_keys)),
            "unexpected": sorted(loaded.unexpected_keys),
            # That the base lies elsewhere than it did in training is no news here.
            "warnings": [m for m in messages if "adapter" in m.lower() and "was renamed" not in m],
        }
        # A NaN compares false and so fails.
        good = not any(report.values()) and difference <= args.tolerance
        all_good = all_good and good
        print(json.dumps({"ok": good, "adapter": adapter.name, "max_abs_diff": difference, **report}))
    sys.exit(0 if all_good else 1)


if __name__ == "__main__":
    main()
