"""Greedy completions by transformers, for `worker generate` to reproduce token for token.

    generate_reference.py MODEL_DIR --prompts PROMPTS.json --max-new-tokens N

PROMPTS is a JSON list of lists of token ids. One JSON list on stdout, in the same order: for each
prompt `{"ids": [new token ids], "margin": M}`, where M is the smallest distance between the best
and the second-best logit met on the way: below the numerical noise a different choice is no error.
Generation stops after the config's eos token, which is included.
"""

import argparse
import json
import os
from pathlib import Path


def complete(model, prompt, max_new_tokens):
    """Full forward passes, no cache: the reference shares no shortcut with what it checks."""
    import torch

    ids, margin = list(prompt), float("inf")
    for _ in range(max_new_tokens):
        logits_v = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        best = torch.topk(logits_v, 2)
        margin = min(margin, (best.values[0] - best.values[1]).item())
        ids.append(best.indices[0].item())
        if ids[-1] == model.config.eos_token_id:
            break
    return {"ids": ids[len(prompt):], "margin": margin}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    args = parser.parse_args()

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    prompts = json.loads(args.prompts.read_text())
    with torch.no_grad():
        print(json.dumps([complete(model, prompt, args.max_new_tokens) for prompt in prompts]))


if __name__ == "__main__":
    main()
