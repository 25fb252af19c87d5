"""What the peer programs share: the shape flags, the model, the batches and the protocol.

Protocol, the same for ours and the peers. On start one line on stdout:
    {"ready": true, "parameters": N, "rss_bytes": N}
then, for each line `go` on stdin, one whole optimizer step and one line:
    {"seconds": S, "tokens": N, "loss": L, "peak_rss_bytes": N, "peak_device_bytes": N or null}
The end of stdin ends the program.
"""

import argparse
import json
import os
import sys
import time
import warnings

PRESETS = {
    "bench": dict(layers=6, width=384, heads=6, inner=1536, vocab=49152, positions=512),
    "qlora": dict(layers=8, width=1024, heads=16, inner=4096, vocab=8192, positions=2048),
    "starcoderbase-1b": dict(layers=24, width=2048, heads=16, inner=8192, vocab=49152, positions=8192),
    "starcoderbase-3b": dict(layers=36, width=2816, heads=22, inner=11264, vocab=49152, positions=8192),
    "bench-llama": dict(layers=6, width=384, heads=6, kv_heads=2, inner=1024, vocab=49152, positions=512),
    "decicoder-1b": dict(layers=20, width=2048, heads=32, kv_heads=4, inner=5888, vocab=49152, positions=2048),
    "starcoder": dict(layers=40, width=6144, heads=48, inner=24576, vocab=49152, positions=8192),
}


def flags(description, preset="bench", add=None):
    """The flags that every program of a benchmark takes; shape flags override the preset, `add(parser)` adds more."""
    parser = argparse.ArgumentParser(description=description)
    if add:
        add(parser)
    parser.add_argument("--preset", choices=sorted(PRESETS), default=preset)
    for name in ("layers", "width", "heads", "kv_heads", "inner", "vocab", "positions"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--sequence", type=int, default=512, help="tokens of one sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences of one rank's step")
    parser.add_argument("--recompute", action="store_true", help="gradient checkpointing of every block")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--threads", type=int, help="torch threads of each rank; cores / ranks when absent")
    args = parser.parse_args()
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.positions = max(args.positions, args.sequence)
    args.threads = args.threads or max(1, len(os.sched_getaffinity(0)) // args.ranks)
    return args


def starcoder(args):
    from transformers import GPTBigCodeConfig

    return GPTBigCodeConfig(
        vocab_size=args.vocab, n_positions=args.positions, n_embd=args.width, n_layer=args.layers,
        n_head=args.heads, n_inner=args.inner, activation_function="gelu_pytorch_tanh", multi_query=True,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        use_cache=False, attn_implementation="sdpa",
    )


def llama(args):
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=args.vocab, max_position_embeddings=args.positions, hidden_size=args.width,
        num_hidden_layers=args.layers, num_attention_heads=args.heads, num_key_value_heads=args.kv_heads,
        intermediate_size=args.inner, bos_token_id=0, eos_token_id=0, use_cache=False, attn_implementation="sdpa",
    )


def build_model(args):
    """A random model with fp32 weights, dropout 0 and transformers' sdpa attention, in train mode.

    A Llama where the shape says how many key-value heads there are, else a GPTBigCode with one.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = llama(args) if args.kv_heads else starcoder(args)
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config).train()
    if args.recompute:
        # Its new name is not in every release that this runs with.
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def batches(args, rank=0):
    """Random tokens without end: the cost of a step does not depend on what they are."""
    import torch

    generator = torch.Generator().manual_seed(rank)
    while True:
        yield torch.randint(args.vocab, (args.batch, args.sequence), generator=generator).to(args.device)


def synchronise(args):
    """Waits for the device, so that a clock read afterwards has seen all work."""
    if args.device == "cuda":
        import torch

        torch.cuda.synchronize()


def memory(field):
    """A field of /proc/self/status in bytes: VmRSS is now, VmHWM the highest so far."""
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return None


def peak_memory(args):
    """Highest memory of this process so far, on the host and on the device."""
    device_bytes = None
    if args.device == "cuda":
        import torch

        device_bytes = torch.cuda.max_memory_allocated()
    return {"peak_rss_bytes": memory("VmHWM"), "peak_device_bytes": device_bytes}


def serve(ready, step):
    """Speaks the protocol; `step()` returns the reply without its time."""
    print(json.dumps({"ready": True, **ready}), flush=True)
    for line in sys.stdin:
        if line.strip() != "go":
            sys.exit(f"unknown request {line.strip()!r}, expected go")
        begin = time.perf_counter()
        reply = step()
        print(json.dumps({"seconds": time.perf_counter() - begin, **reply}), flush=True)
