"""Whole QLoRA steps of transformers, bitsandbytes and peft on one device, as a careful user sets them up.

The base in bf16 with its linears in NF4 (blocks of 64, double quantisation, bf16 compute), the head as it
is; LoRA on the four linears of each block with alpha twice the rank and no dropout, its weights in fp32;
sdpa attention, clipping, fused AdamW, and with --recompute non-reentrant checkpointing of each block.
Left out is what costs and brings nothing: peft's prepare_model_for_kbit_training, which casts the
embeddings and norms to fp32. Autocast lets the adapter multiply in bf16, as a transformers Trainer
with bf16=True does; without it peft casts every activation to fp32 and back.
"""

import logging
import os
import warnings

import peer

TARGETS = ["c_proj", "c_attn", "q_attn", "c_fc"]


def add_flags(parser):
    parser.add_argument("--rank", type=int, default=32, help="rank of the adapter")
    parser.add_argument("--base", choices=("nf4", "fp4", "none"), default="nf4", help="how linears are held")
    parser.add_argument("--no-autocast", action="store_true", help="multiply with the adapter in fp32")


def build_base(args):
    """A random GPTBigCode in bf16, made on its device and quantised linear by linear: never whole in bf16."""
    import bitsandbytes as bnb
    import torch
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

    config = GPTBigCodeConfig(
        vocab_size=args.vocab, n_positions=args.positions, n_embd=args.width, n_layer=args.layers,
        n_head=args.heads, n_inner=args.inner, activation_function="gelu_pytorch_tanh", multi_query=True,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        use_cache=False, attn_implementation="sdpa",
    )
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    with torch.device("meta"):
        model = GPTBigCodeForCausalLM(config).to(dtype)

    def fresh(parameter):
        return torch.empty(parameter.shape, dtype=dtype, device=args.device).normal_(0.0, 0.02)

    def materialise(module):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not isinstance(parameter, bnb.nn.Params4bit):
                setattr(module, name, torch.nn.Parameter(fresh(parameter), requires_grad=False))
        for name, child in list(module.named_children()):
            if args.base != "none" and name in TARGETS:
                weight = bnb.nn.Params4bit(fresh(child.weight), quant_type=args.base).to(args.device)
                shape = (child.in_features, child.out_features)
                child = bnb.nn.Linear4bit(*shape, compute_dtype=dtype, quant_type=args.base, device="meta")
                child.weight = weight
                setattr(module, name, child)
            materialise(child)

    materialise(model)
    # The one buffer is a causal mask, which sdpa attention does not look at.
    model.transformer.bias = torch.ones((), dtype=torch.bool, device=args.device)
    assert all(tensor.device.type == args.device for tensor in [*model.parameters(), *model.buffers()])
    model.tie_weights()
    # What from_pretrained says of a model that it quantised.
    model.is_loaded_in_4bit = args.base != "none"
    return model.train()


def build_model(args):
    """The base under its adapter."""
    import peft

    # peft and this ask for gradient checkpointing by names that will change.
    warnings.simplefilter("ignore", FutureWarning)
    model = build_base(args)
    if args.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = peft.LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)


def main():
    args = peer.flags(__doc__, preset="qlora", add=add_flags)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # It says on import that an optional package is not there.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = build_model(args)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.dtype == torch.float32 for parameter in trainable)
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.1, fused=True)
    tokens = peer.batches(args)
    autocast = args.precision == "bf16" and not args.no_autocast

    def step():
        ids_bt = next(tokens)
        with torch.autocast(args.device, torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids_bt, labels=ids_bt).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss = loss.item()
        peer.synchronise(args)
        return {"tokens": ids_bt.numel(), "loss": loss, **peer.peak_memory(args)}

    # The base's and the adapter's, four-bit weights counted one by one.
    parameters = model.get_nb_trainable_parameters()[1]
    peer.serve({"parameters": parameters, "rss_bytes": peer.memory("VmRSS")}, step)


if __name__ == "__main__":
    main()
