"""Writes the loss curves of peft and bitsandbytes training a tiny NF4 model in fp32 and in bf16.

    qlora_curves.py OUT_DIR

The format is described in README.md beside this file; idempotent like make_fixtures.py. Three seeds of
100 steps: plain AdamW on the fp32 adapter, no clipping, a constant rate. Each seed has its own initial
A, B is zero, and four random batches take turns, so that there is something to learn. Both bf16 peers
are the model in bf16 with the adapter as peft keeps it, in fp32: `bf16` computes with it in fp32,
`autocast` in bf16, as a transformers Trainer does. Comparing the two tells how well a distance from fp32
repeats: over all seeds within 4% by root mean square and 22% by the largest one, of a single seed within
25% and 62%.
"""

import argparse
import warnings
from pathlib import Path

from fixture_dir import once
from make_fixtures import loss_of, make_batch, randomise
from make_qlora_fixtures import TARGETS, adapt, load, make_scales_agree

CASE = dict(name="model", vocab_size=120, n_positions=32, n_embd=64, n_head=2, n_layer=2,
            n_inner=128, activation_function="gelu_pytorch_tanh", batch=8, tokens=32)
BASE = "nf4-64-double"
LORA = dict(r=8, lora_alpha=16)
SEEDS, STEPS, BATCHES = 3, 100, 4
ADAMW = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)


def train(model, ids_sbt, targets_sbt, autocast):
    """The loss before each step."""
    import torch

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **ADAMW)
    losses = []
    for ids_bt, targets_bt in zip(ids_sbt, targets_sbt):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits_btv = model(input_ids=ids_bt, use_cache=False).logits
        loss = loss_of(logits_btv, targets_bt)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def make(out):
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

    torch.use_deterministic_algorithms(True)
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    shape = {k: v for k, v in CASE.items() if k not in ("name", "batch", "tokens")}
    config = GPTBigCodeConfig(
        **shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, multi_query=True, bos_token_id=0, eos_token_id=0
    )
    generator = torch.Generator().manual_seed(5000)
    model = GPTBigCodeForCausalLM(config)
    randomise(model, generator)
    make_scales_agree(model, generator)
    directory = out / CASE["name"]
    model.save_pretrained(directory, safe_serialization=True)

    seeds = []
    for seed in range(SEEDS):
        torch.manual_seed(seed)  # of A
        lora = LoraConfig(lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM", **LORA)
        model = get_peft_model(load(directory, BASE, torch.float32, "sdpa"), lora)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(parameter.bfloat16())
        adapter = out / f"seed-{seed}"
        model.save_pretrained(adapter)

        batches = [make_batch(config.vocab_size, CASE, generator) for _ in range(BATCHES)]
        ids_sbt, targets_sbt = (torch.stack(parts).repeat(STEPS // BATCHES, 1, 1) for parts in zip(*batches))
        tensors = {"ids": ids_sbt, "targets": targets_sbt}
        for peer, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("autocast", torch.bfloat16)):
            model = adapt(load(directory, BASE, dtype, "sdpa"), adapter)
            tensors[f"{peer}.loss"] = train(model, ids_sbt, targets_sbt, peer == "autocast")
        save_file(tensors, adapter / "curves.safetensors")
        apart = {peer: tensors[f"{peer}.loss"] - tensors["fp32.loss"] for peer in ("bf16", "autocast")}
        largest = {peer: x.abs().max().item() for peer, x in apart.items()}
        rms = {peer: x.square().mean().sqrt().item() for peer, x in apart.items()}
        seeds.append({"directory": adapter.name, "largest": largest, "rms": rms})
    return {"model": CASE["name"], "base": BASE, "lora": LORA, "adamw": ADAMW, "steps": STEPS, "seeds": seeds}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory of the fixtures")
    out = parser.parse_args().out
    beside = ("qlora_curves.py", "make_qlora_fixtures.py", "make_quant_fixtures.py", "make_fixtures.py")
    once(out, [Path(__file__).with_name(name) for name in beside], lambda: make(out))


if __name__ == "__main__":
    main()
