"""Writes what peft and bitsandbytes compute of LoRA, rsLoRA and DoRA over plain and quantised bases.

    make_qlora_fixtures.py OUT_DIR

The format is described in README.md beside this file; idempotent like make_fixtures.py, whose batches
and loss it shares. The peer is `from_pretrained(quantization_config=...)`, which works on a CPU, and
`PeftModel.from_pretrained` of the adapter that is in the fixture. lora_dropout is 0, of which peft
makes nn.Identity. It asserts that gradient checkpointing changes no gradient.

Widths are multiples of 64: elsewhere bitsandbytes dequantises wrongly on this kind of machine (see
make_quant_fixtures.py). Weights whose nested scale would get another 8-bit code from bitsandbytes' table
on the CPU than by nearest value, as on CUDA, are drawn again, so that both rules agree on every base here.
"""

import argparse
import warnings
from pathlib import Path

from fixture_dir import once
from make_fixtures import BF16_BATCHES, loss_of, make_batch, randomise, starcoder
from make_quant_fixtures import nearest8

BLOCK = 64
TARGETS = ["c_proj", "c_attn", "q_attn", "c_fc"]  # no module is named q_attn
# Of the blocks of every family.
LINEARS = {*TARGETS, "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
MODELS = [
    dict(name="one-block", vocab_size=97, n_positions=64, n_embd=64, n_head=2, n_layer=1,
         n_inner=None, activation_function="gelu_pytorch_tanh", batch=2, tokens=24),
    dict(name="three-blocks", vocab_size=200, n_positions=40, n_embd=128, n_head=4, n_layer=3,
         n_inner=320, activation_function="gelu", batch=2, tokens=33),
]
BASES = {
    "plain": None,
    "nf4-64": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4-64-double": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "fp4-64-double": dict(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True),
    "int8": dict(load_in_8bit=True),
}
VARIANTS = [
    dict(name="plain", base="plain"),
    dict(name="nf4", base="nf4-64"),
    dict(name="nf4-double", base="nf4-64-double"),
    dict(name="fp4-double", base="fp4-64-double"),
    dict(name="int8", base="int8"),
    dict(name="rslora", base="nf4-64-double", use_rslora=True),
    dict(name="dora", base="plain", use_dora=True),
    dict(name="dora-nf4", base="nf4-64-double", use_dora=True),
    dict(name="norms", base="nf4-64-double", modules_to_save=["ln_f", "ln_1"]),
    dict(name="tokens", base="nf4-64-double", trainable_token_indices=[0, 3, 50, 96]),
]


# Embedding and head are two tables, of which rows are trained.
UNTIED = dict(name="untied", vocab_size=128, batch=2, tokens=24)
UNTIED_VARIANTS = [
    dict(name="tokens", base="nf4-64-double", trainable_token_indices=dict(embed_tokens=[2, 90, 127], lm_head=[2, 90, 127])),
]


def untied():
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )


def linears(model):
    """The linears of the blocks by name; under an adapter, those of the base."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in LINEARS and ".lora_" not in name:
            yield name, module.get_base_layer() if hasattr(module, "get_base_layer") else module


def make_scales_agree(model, generator):
    """Draws blocks again until bitsandbytes' 8-bit codes of all nested scales are the nearest ones."""
    import torch
    from bitsandbytes import functional as F

    for _, module in linears(model):
        differ = torch.tensor([True])
        while differ.any():
            weight_nk = module.weight.data
            absmax = weight_nk.view(-1, BLOCK).abs().amax(1)
            state = F.quantize_4bit(weight_nk, blocksize=BLOCK, quant_type="nf4", compress_statistics=True)[1]
            differ = nearest8(absmax - state.offset, state.state2.code)[0] != state.absmax
            fresh = 0.08 * torch.randn(int(differ.sum()), BLOCK, generator=generator)
            weight_nk.view(-1, BLOCK)[differ] = fresh.bfloat16().float()


def load(directory, base, dtype, attention):
    """The base model in train mode, quantised as `base` says, computing in `dtype`."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BASES[base]
    if settings and "load_in_4bit" in settings:
        settings = dict(settings, bnb_4bit_compute_dtype=dtype)
    quantization = BitsAndBytesConfig(**settings) if settings else None
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation=attention, quantization_config=quantization
    ).train()


def dequantised(directory, base):
    """What bitsandbytes makes of the blocks' linears, in fp32, by the name of the weight."""
    import bitsandbytes as bnb
    import torch

    weights = {}
    for name, module in linears(load(directory, base, torch.float32, "eager")):
        weight_nk = module.weight
        if isinstance(module, bnb.nn.Linear4bit):
            weight_nk = bnb.functional.dequantize_4bit(weight_nk, weight_nk.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            # As Linear8bitLt computes it when it trains on a CPU.
            weight_nk = weight_nk.data.float().mul_(weight_nk.SCB.unsqueeze(1).mul(1.0 / 127.0))
        weights[f"{name}.weight"] = weight_nk.detach().clone()
    return weights


def adapt(model, adapter):
    """`model` under the saved adapter, trainable."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, adapter, is_trainable=True).train()


def make_adapter(model, variant, generator, path):
    """A random adapter, exact in bf16 and with B not zero, as peft saves it."""
    import torch
    from peft import LoraConfig, get_peft_model

    options = {key: value for key, value in variant.items() if key not in ("name", "base")}
    targets = TARGETS if model.config.model_type == "gpt_bigcode" else "all-linear"
    config = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM", **options
    )
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if "magnitude" in name:
                value = parameter * (1 + 0.1 * noise)
            elif ".ln_" in name and name.endswith("weight"):
                value = 1 + 0.1 * noise
            else:
                value = 0.08 * noise
            parameter.copy_(value.bfloat16())
    model.save_pretrained(path)


def gradients(model, ids_bt, targets_bt):
    """Logits, loss and the gradients of all trainable parameters, named as peft saves them."""
    import torch
    from peft import get_peft_model_state_dict

    model.zero_grad(set_to_none=True)
    logits_btv = model(input_ids=ids_bt, use_cache=False).logits
    loss = loss_of(logits_btv, targets_bt)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in grads.values())
    named = get_peft_model_state_dict(model, state_dict=grads)
    assert len(named) == len(grads)
    tensors = {"logits": logits_btv.detach().contiguous(), "loss": loss.detach().reshape(1)}
    return tensors | {f"grad.{name}": grad.clone().contiguous() for name, grad in named.items()}


def reference(directory, weights):
    """The base in fp64 with the dequantised weights."""
    import torch

    model = load(directory, "plain", torch.float64, "sdpa")
    for name, module in linears(model):
        module.weight.data = weights[f"{name}.weight"].double()
    return model


def make_variant(variant, directory, batches, weights, generator):
    import torch
    from safetensors.torch import save_file

    path = directory / variant["name"]
    make_adapter(load(directory, variant["base"], torch.float32, "eager"), variant, generator, path)

    ids_bt, targets_bt = batches[0]
    peer = adapt(load(directory, variant["base"], torch.float32, "eager"), path)
    tensors = {"ids": ids_bt, "targets": targets_bt} | gradients(peer, ids_bt, targets_bt)
    peer.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, value in gradients(peer, ids_bt, targets_bt).items():
        assert value.equal(tensors[name]), f"{path}: gradient checkpointing changes {name}"
    save_file(tensors, path / "fixture.safetensors")

    ids_kbt, targets_kbt = (torch.stack(parts) for parts in zip(*batches))
    tensors = {"ids": ids_kbt, "targets": targets_kbt}
    low = adapt(load(directory, variant["base"], torch.bfloat16, "sdpa"), path)
    high = adapt(reference(directory, weights), path).double()
    for model, prefix, autocast in ((low, "bf16.", False), (low, "autocast.", True), (high, "fp64.", False)):
        results = []
        for ids_bt, targets_bt in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                results.append(gradients(model, ids_bt, targets_bt))
        names = [name for name in results[0] if name.startswith("grad.")]
        tensors |= {prefix + name: torch.stack([result[name] for result in results]) for name in names}
    save_file(tensors, path / "bf16.safetensors")


def make_adapted(config, case, variants, seed, out):
    """A random model, its bases and variants over them."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    randomise(model, generator)
    make_scales_agree(model, generator)
    directory = out / case["name"]
    model.save_pretrained(directory, safe_serialization=True)
    batches = [make_batch(config.vocab_size, case, generator) for _ in range(BF16_BATCHES)]

    weights = {base: dequantised(directory, base) for base in {variant["base"]: None for variant in variants}}
    for base, named in weights.items():
        save_file(named, directory / f"{base}.safetensors")
    for variant in variants:
        make_variant(variant, directory, batches, weights[variant["base"]], generator)
    return {"name": case["name"], "directory": case["name"], "batch": case["batch"], "tokens": case["tokens"]}


def make(out):
    import torch
    import transformers

    torch.use_deterministic_algorithms(True)
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    models = [make_adapted(starcoder(case), case, VARIANTS, 4000 + i, out) for i, case in enumerate(MODELS)]
    placed = lambda variants: [dict(variant, directory=variant["name"]) for variant in variants]
    models.append(make_adapted(untied(), UNTIED, UNTIED_VARIANTS, 4100, out) | {"variants": placed(UNTIED_VARIANTS)})
    return {"models": models, "variants": placed(VARIANTS)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory of the fixtures")
    out = parser.parse_args().out
    beside = ("make_qlora_fixtures.py", "make_quant_fixtures.py", "make_fixtures.py")
    once(out, [Path(__file__).with_name(name) for name in beside], lambda: make(out))


if __name__ == "__main__":
    main()
