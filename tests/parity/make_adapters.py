"""Writes what PEFT makes of random adapters, for the Rust parity tests to compare with.

    make_adapters.py --out DIR --models DIR

MODELS is what make_fixtures.py wrote. Idempotent, as that program is. The format is described in
README.md beside this file.
"""

import argparse
import warnings
from pathlib import Path

from fixture_dir import once

MODEL = "exact-gelu"
ALL = ["c_attn", "c_proj", "c_fc"]
ADAPTERS = {
    "plain": dict(r=8, lora_alpha=16, target_modules=ALL),
    "same-rank": dict(r=8, lora_alpha=4, target_modules=ALL),
    "other-rank": dict(r=4, lora_alpha=12, target_modules=["c_attn", "mlp.c_proj"]),
    "rslora": dict(r=8, lora_alpha=8, target_modules=ALL, use_rslora=True),
    "patterns": dict(r=8, lora_alpha=16, target_modules=ALL, rank_pattern={"mlp.c_fc": 3, "h.1.attn.c_attn": 5},
                     alpha_pattern={"attn.c_proj": 5}),
    "regex": dict(r=4, lora_alpha=8, target_modules=r".*\.h\.[01]\.mlp\.c_(fc|proj)"),
    "all-linear": dict(r=2, lora_alpha=2, target_modules="all-linear"),
    "dora": dict(r=4, lora_alpha=8, target_modules=ALL, use_dora=True),
    "tokens": dict(r=4, lora_alpha=8, target_modules=["c_attn"], trainable_token_indices=[1, 40, 127]),
    "saved": dict(r=4, lora_alpha=8, target_modules=["c_attn"], modules_to_save=["ln_f"]),
}
# Adapters, weights, combination and its arguments. `differs`: ours is something else without --peft-compat.
COMBINATIONS = [
    dict(adapters=["plain"], weights=[0.8], combination_type="cat"),
    dict(adapters=["plain"], weights=[-0.8], combination_type="ties", density=0.3, differs=True),
    dict(adapters=["plain", "other-rank"], weights=[1.0, 1.0], combination_type="cat"),
    dict(adapters=["plain", "patterns", "rslora"], weights=[1.0, -0.5, 2.0], combination_type="cat"),
    dict(adapters=["rslora", "other-rank"], weights=[1.0, 0.5], combination_type="cat", differs=True),
    dict(adapters=["rslora", "plain"], weights=[1.0, 0.5], combination_type="linear", differs=True),
    dict(adapters=["plain", "same-rank"], weights=[0.7, -1.1], combination_type="linear"),
    dict(adapters=["plain", "other-rank"], weights=[0.5, 0.5], combination_type="svd"),
    dict(adapters=["plain", "rslora"], weights=[1.5, -0.5], combination_type="svd", svd_rank=5),
    dict(adapters=["regex", "regex"], weights=[1.0, 1.0], combination_type="svd"),
    dict(adapters=["plain", "same-rank"], weights=[1.0, 0.5], combination_type="magnitude_prune", density=0.4),
    dict(adapters=["plain", "other-rank"], weights=[1.0, 0.5], combination_type="magnitude_prune_svd", density=0.4),
    dict(adapters=["plain", "same-rank"], weights=[1.0, -0.5], combination_type="ties", density=0.5, differs=True),
    dict(adapters=["plain", "same-rank"], weights=[1.0, 1.0], combination_type="ties", density=0.5,
         majority_sign_method="frequency"),
    dict(adapters=["plain", "other-rank"], weights=[1.0, -2.0], combination_type="ties_svd", density=0.5, differs=True),
    dict(adapters=["plain", "other-rank"], weights=[1.0, 2.0], combination_type="ties_svd", density=0.5,
         majority_sign_method="frequency"),
    # With nothing pruned, dare draws nothing.
    dict(adapters=["plain", "same-rank"], weights=[1.0, 0.5], combination_type="dare_linear", density=1.0),
    dict(adapters=["plain", "same-rank"], weights=[1.0, 1.0], combination_type="dare_ties", density=1.0,
         majority_sign_method="frequency"),
    dict(adapters=["plain", "other-rank"], weights=[1.0, 0.5], combination_type="dare_linear_svd", density=1.0),
    dict(adapters=["plain", "other-rank"], weights=[1.0, 0.5], combination_type="dare_ties_svd", density=1.0,
         majority_sign_method="frequency"),
]


def load_base(models, dtype):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        models / MODEL, dtype=dtype, attn_implementation="eager"
    ).eval()


def randomise(model, seed):
    """Every trained value random: a new B is zero, and a new magnitude is the base's own."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
            elif any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens_delta")):
                parameter.copy_((0.1 * torch.randn(parameter.shape, generator=generator)).bfloat16())


def logits(model, ids):
    import torch

    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float().contiguous()


def make_adapter(name, seed, models, out, ids):
    """One adapter as PEFT saves it in fp32 and bf16; its logits; its base merged by PEFT in both dtypes."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors.torch import save_file

    config = LoraConfig(task_type="CAUSAL_LM", **ADAPTERS[name])
    model = get_peft_model(load_base(models, torch.float32), config)
    randomise(model, seed)
    model.eval().save_pretrained(out / name)
    results = {"ids": ids, "logits": logits(model, ids)}
    save_file(results, out / f"{name}.safetensors")

    def save_merged(base_dtype, path):
        loaded = PeftModel.from_pretrained(load_base(models, base_dtype), out / name)
        merged = loaded.merge_and_unload()
        state = {k: v.contiguous() for k, v in merged.state_dict().items() if k != "lm_head.weight"}
        save_file(state, path)

    save_merged(torch.float32, out / f"{name}.merged-fp32.safetensors")
    save_merged(torch.bfloat16, out / f"{name}.merged-bf16.safetensors")
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    model.save_pretrained(out / f"{name}-bf16")


def make_combination(index, case, models, out):
    """What add_weighted_adapter makes: whole differences of every module, fp32."""
    import torch
    from peft import PeftModel
    from safetensors.torch import save_file

    arguments = {k: v for k, v in case.items() if k not in ("adapters", "differs")}
    names = [f"a{i}" for i in range(len(case["adapters"]))]
    model = PeftModel.from_pretrained(load_base(models, torch.float32), out / case["adapters"][0], adapter_name=names[0])
    for name, adapter in zip(names[1:], case["adapters"][1:]):
        model.load_adapter(out / adapter, adapter_name=name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(names, adapter_name="result", **arguments)
    deltas = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A") and "result" in module.lora_A:
            deltas[name] = module.get_delta_weight("result").detach().contiguous()
    file = f"combination-{index:02}.safetensors"
    save_file(deltas, out / file)
    return {**case, "file": file}


def make(out, models):
    import torch
    import transformers
    from safetensors.torch import load_file

    torch.use_deterministic_algorithms(True)
    transformers.logging.disable_progress_bar()
    ids = load_file(models / MODEL / "fixture.safetensors")["ids"]
    for i, name in enumerate(ADAPTERS):
        make_adapter(name, 3000 + i, models, out, ids)
    combinations = [make_combination(i, case, models, out) for i, case in enumerate(COMBINATIONS)]
    return {"model": MODEL, "adapters": list(ADAPTERS), "combinations": combinations}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the fixtures")
    parser.add_argument("--models", type=Path, required=True, help="what make_fixtures.py wrote")
    args = parser.parse_args()
    sources = [Path(__file__), args.models / "index.json"]
    once(args.out, sources, lambda: make(args.out, args.models))


if __name__ == "__main__":
    main()
