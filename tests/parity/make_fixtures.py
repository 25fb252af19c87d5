"""Writes what transformers and PyTorch compute, for the Rust parity tests to compare with.

    make_fixtures.py --out DIR

Idempotent: DIR/index.json is written last and names the generator that made it; when it is there
and current, the call returns at once (concurrent calls wait for the first). The format is
described in README.md beside this file.
"""

import argparse
from pathlib import Path

from fixture_dir import once

# Odd sizes on purpose: a test that hard-codes one of them cannot pass on the others.
# `tokens` below `n_positions` leaves position rows without a gradient.
MODELS = [
    dict(name="one-block", vocab_size=97, n_positions=64, n_embd=32, n_head=2, n_layer=1,
         n_inner=None, activation_function="gelu_pytorch_tanh", batch=2, tokens=24),
    dict(name="exact-gelu", vocab_size=128, n_positions=48, n_embd=48, n_head=4, n_layer=2,
         n_inner=None, activation_function="gelu", batch=3, tokens=48),
    dict(name="narrow-mlp", vocab_size=200, n_positions=40, n_embd=48, n_head=3, n_layer=3,
         n_inner=80, activation_function="gelu_pytorch_tanh", batch=2, tokens=33),
    dict(name="one-head", vocab_size=111, n_positions=33, n_embd=32, n_head=1, n_layer=2,
         n_inner=160, activation_function="gelu", batch=1, tokens=33),
]
ATTENTION = [
    dict(name="multi-query", batch=2, heads=4, kv_heads=1, tokens=37, head_dim=16),
    dict(name="multi-head", batch=2, heads=3, kv_heads=3, tokens=21, head_dim=8),
    dict(name="grouped-query", batch=1, heads=6, kv_heads=2, tokens=40, head_dim=32),
    dict(name="one-token", batch=2, heads=2, kv_heads=1, tokens=1, head_dim=16),
]
# One batch has too few independent roundings in a small tensor to tell two bf16 implementations apart.
BF16_BATCHES = 8
IGNORE = -100
# Of those that the model has positions for.
GREEDY_TOKENS = 12


def loss_of(logits_btv, targets_bt):
    """Mean cross-entropy over targets that are not IGNORE; in fp64 when the logits are, else in fp32."""
    import torch

    dtype = torch.promote_types(logits_btv.dtype, torch.float32)
    rows = logits_btv.to(dtype).flatten(0, 1)
    return torch.nn.functional.cross_entropy(rows, targets_bt.flatten(), ignore_index=IGNORE)


def randomise(model, generator):
    """Every parameter random, biases and norms too, and exact in bf16: all dtypes share one set of weights."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            is_norm_weight = parameter.dim() == 1 and name.endswith("weight")
            value = 1 + 0.1 * noise if is_norm_weight else 0.08 * noise
            parameter.copy_(value.bfloat16())


def make_batch(vocab_size, case, generator):
    """Random tokens and their shifted targets, of which a fifth does not count."""
    import torch

    ids_bt = torch.randint(vocab_size, (case["batch"], case["tokens"]), generator=generator)
    following_b1 = torch.randint(vocab_size, (case["batch"], 1), generator=generator)
    targets_bt = torch.cat([ids_bt[:, 1:], following_b1], dim=1)
    targets_bt[torch.rand(targets_bt.shape, generator=generator) < 0.2] = IGNORE
    targets_bt[:, -1] = following_b1[:, 0]  # at least one target counts in each row
    return ids_bt, targets_bt


def forward_backward(model, ids_bt, targets_bt):
    """Logits, loss and every gradient of one batch, named for the fixture."""
    import torch

    model.zero_grad(set_to_none=True)
    logits_btv = model(input_ids=ids_bt, use_cache=False).logits
    loss = loss_of(logits_btv, targets_bt)
    loss.backward()
    tensors = {"logits": logits_btv.detach().contiguous(), "loss": loss.detach().reshape(1)}
    for name, parameter in model.named_parameters():
        grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        tensors[f"grad.{name}"] = grad.clone().contiguous()
    return tensors


def starcoder(case):
    """The configuration of one of MODELS, whose other entries are GPTBigCode's own keys."""
    from transformers import GPTBigCodeConfig

    shape = {k: v for k, v in case.items() if k not in ("name", "batch", "tokens")}
    return GPTBigCodeConfig(
        **shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, multi_query=True, bos_token_id=0, eos_token_id=0
    )


def make_model(config, case, seed, out):
    """One random model: its directory as `save_pretrained` writes it, and its fixtures beside it."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(seed)
    directory = out / case["name"]

    model = AutoModelForCausalLM.from_config(config).train()
    randomise(model, generator)
    model.save_pretrained(directory, safe_serialization=True)

    batches = [make_batch(config.vocab_size, case, generator) for _ in range(BF16_BATCHES)]

    def load(dtype, attention):
        return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation=attention).train()

    ids_bt, targets_bt = batches[0]
    peer = load(torch.float32, "eager")
    tensors = {"ids": ids_bt, "targets": targets_bt} | forward_backward(peer, ids_bt, targets_bt)
    # The loss rule above is transformers' own.
    own = peer(input_ids=ids_bt, labels=targets_bt, shift_labels=targets_bt, use_cache=False).loss
    torch.testing.assert_close(own.detach().reshape(1), tensors["loss"], rtol=1e-6, atol=0)
    tensors |= greedy(peer, case, generator)
    save_file(tensors, directory / "fixture.safetensors")

    ids_kbt, targets_kbt = (torch.stack(parts) for parts in zip(*batches))
    tensors = {"ids": ids_kbt, "targets": targets_kbt}
    # The reference softmax of transformers' eager path is cast to fp32, so fp64 goes through sdpa.
    for dtype, prefix in ((torch.bfloat16, "bf16."), (torch.float64, "fp64.")):
        peer = load(dtype, "sdpa")
        results = [forward_backward(peer, ids_bt, targets_bt) for ids_bt, targets_bt in batches]
        grads = [name for name in results[0] if name.startswith("grad.")]
        tensors |= {prefix + name: torch.stack([result[name] for result in results]) for name in grads}
    save_file(tensors, directory / "bf16.safetensors")
    return {"name": case["name"], "directory": case["name"], "batch": case["batch"], "tokens": case["tokens"]}


def greedy(model, case, generator):
    """A prompt, the tokens that `generate` makes of it, and how far each was ahead of the second."""
    import torch

    prompt = torch.randint(model.config.vocab_size, (1, case["tokens"] // 2), generator=generator)
    made = model.eval().generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=GREEDY_TOKENS, min_new_tokens=GREEDY_TOKENS,
        pad_token_id=0, eos_token_id=None, output_scores=True, return_dict_in_generate=True,
    )
    model.train()
    margins = [scores[0].topk(2).values.diff().abs() for scores in made.scores]
    return {
        "prompt": prompt[0],
        "greedy": made.sequences[0, prompt.shape[1]:].clone(),
        "margins": torch.cat(margins).float(),
    }


def make_attention(case, seed, out):
    """Causal attention written out in fp64: output and the gradients of q, k and v."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)

    def random(heads):
        return torch.randn(
            case["batch"], heads, case["tokens"], case["head_dim"], generator=generator, dtype=torch.float32
        )

    q_bhtk, do_bhtk = random(case["heads"]), random(case["heads"])
    k_bgtk, v_bgtk = random(case["kv_heads"]), random(case["kv_heads"])
    q, k, v = (x.double().requires_grad_() for x in (q_bhtk, k_bgtk, v_bgtk))
    group = case["heads"] // case["kv_heads"]
    scores_bhts = q @ k.repeat_interleave(group, dim=1).transpose(2, 3) / case["head_dim"] ** 0.5
    future_ts = torch.ones(case["tokens"], case["tokens"], dtype=torch.bool).triu(1)
    weights_bhts = scores_bhts.masked_fill(future_ts, float("-inf")).softmax(dim=-1)
    o_bhtk = weights_bhts @ v.repeat_interleave(group, dim=1)
    o_bhtk.backward(do_bhtk.double())

    results = {"o": o_bhtk.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}
    tensors = {"q": q_bhtk, "k": k_bgtk, "v": v_bgtk, "do": do_bhtk}
    tensors |= {name: value.contiguous() for name, value in results.items()}
    file = f"attention-{case['name']}.safetensors"
    save_file(tensors, out / file)
    return {**case, "file": file}


def make(out):
    import torch
    import transformers

    torch.use_deterministic_algorithms(True)
    transformers.logging.disable_progress_bar()
    models = [make_model(starcoder(case), case, 1000 + i, out) for i, case in enumerate(MODELS)]
    attention = [make_attention(case, 2000 + i, out) for i, case in enumerate(ATTENTION)]
    return {"models": models, "attention": attention}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the fixtures")
    out = parser.parse_args().out
    once(out, [Path(__file__)], lambda: make(out))


if __name__ == "__main__":
    main()
