"""Writes the loss curves of PyTorch FSDP2 over gloo, of every strategy, in fp32 and in bf16.

    fsdp2_curves.py OUT_DIR [--all]

The format is described in README.md beside this file; idempotent like make_fixtures.py. Three seeds,
each with its own initial weights and data: four batches of random tokens take turns, so that there is
something to learn, and the tails of sequences do not count, so that ranks count differently. AdamW with
the Trainer's exclusions from weight decay, clipping at a norm that is exceeded, gradients accumulated.

Without --all: in fp32 most strategies from the first seed, and in bf16 one of them from all seeds.
"""

import argparse
import multiprocessing
import tempfile
from pathlib import Path

from fixture_dir import once
from make_fixtures import IGNORE

SHAPE = dict(vocab_size=256, n_positions=40, n_embd=64, n_head=4, n_layer=3, n_inner=192,
             activation_function="gelu_pytorch_tanh")
TOKENS, SEQUENCES, ACCUMULATE = 32, 8, 2
SEEDS, STEPS, BATCHES = 3, 50, 4
# At 1e-3 differences in rounding grow so fast that bf16 curves of two strategies stray twofold differently.
ADAMW = dict(lr=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05)
MAX_GRAD_NORM = 1.0
STRATEGIES = {2: ("full_shard", "shard_grad_op", "no_shard"),
              4: ("full_shard", "shard_grad_op", "hybrid_shard", "no_shard")}


def plan(every):
    """The curves, in the order in which they are made."""
    return [
        dict(seed=seed, precision=precision, strategy=strategy, ranks=ranks,
             file=f"seed-{seed}/{precision}-{strategy}-{ranks}.safetensors")
        for ranks, strategies in STRATEGIES.items()
        for seed in range(SEEDS)
        for precision in ("fp32", "bf16")
        for strategy in strategies
        if every or is_brief(seed, precision, strategy, ranks)
    ]


def is_brief(seed, precision, strategy, ranks):
    """Whether a curve is made without --all too."""
    if (ranks, strategy) == (2, "full_shard"):
        return True
    # shard_grad_op repeats full_shard to the bit; of no_shard two ranks show what four do.
    return (seed, precision) == (0, "fp32") and (
        strategy in ("full_shard", "hybrid_shard") or (ranks, strategy) == (2, "no_shard")
    )


def make_seed(seed, directory):
    """Initial weights as transformers draws and saves them, and the sequences of all steps."""
    import torch
    from safetensors.torch import save_file
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

    config = GPTBigCodeConfig(
        **SHAPE, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, multi_query=True, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(seed)
    model = GPTBigCodeForCausalLM(config)
    model.save_pretrained(directory / "model", safe_serialization=True)

    tokens = torch.randint(SHAPE["vocab_size"], (BATCHES, SEQUENCES, TOKENS + 1))
    counted = torch.randint(TOKENS // 4, TOKENS + 1, (BATCHES, SEQUENCES, 1))
    targets = torch.where(torch.arange(TOKENS) < counted, tokens[..., 1:], IGNORE)
    repeats = (-(-STEPS // BATCHES), 1, 1)
    save_file(
        {"ids": tokens[..., :-1].repeat(repeats)[:STEPS].contiguous(),
         "targets": targets.repeat(repeats)[:STEPS].contiguous()},
        directory / "sequences.safetensors",
    )
    return model


def sharded(directory, curve):
    """The model as `fully_shard` leaves it."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers import GPTBigCodeForCausalLM

    ranks, strategy = curve["ranks"], curve["strategy"]
    model = GPTBigCodeForCausalLM.from_pretrained(
        directory / "model", dtype=torch.float32, attn_implementation="sdpa"
    ).train()
    # Two dimensions are copies, and ranks that share one.
    shape = {"hybrid_shard": (ranks // 2, 2), "no_shard": (ranks, 1)}.get(strategy, (ranks,))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "shards")[-len(shape):])
    policy = MixedPrecisionPolicy()
    if curve["precision"] == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options = dict(mesh=mesh, mp_policy=policy, reshard_after_forward=strategy != "shard_grad_op")
    for block in model.transformer.h:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def train(directory, curve, decays, rank):
    """Loss and gradient norm of each step, and the weights at the end."""
    import torch
    import torch.distributed as dist
    from safetensors.torch import load_file

    model, ranks = sharded(directory, curve), curve["ranks"]
    named = list(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [{"params": [p for name, p in named if name in decays]},
         {"params": [p for name, p in named if name not in decays], "weight_decay": 0.0}],
        fused=True, **ADAMW,
    )
    sequences = load_file(directory / "sequences.safetensors")
    # A step's sequences go to the ranks micro-batch by micro-batch.
    cut = (STEPS, ACCUMULATE, ranks, SEQUENCES // ACCUMULATE // ranks, TOKENS)
    ids_sabt, targets_sabt = (sequences[name].view(cut)[:, :, rank] for name in ("ids", "targets"))
    counted_s = (sequences["targets"] != IGNORE).sum(dim=(1, 2))
    loss_sums_s = torch.zeros(STEPS, dtype=torch.float64)
    grad_norms_s = torch.zeros(STEPS, dtype=torch.float64)
    for step in range(STEPS):
        for ids_bt, targets_bt in zip(ids_sabt[step], targets_sabt[step]):
            logits_nv = model(input_ids=ids_bt, use_cache=False).logits.float().flatten(0, 1)
            losses_n = torch.nn.functional.cross_entropy(
                logits_nv, targets_bt.flatten(), ignore_index=IGNORE, reduction="none"
            )
            # FSDP averages gradients over ranks, and the sum over all is wanted.
            (losses_n.sum() * (ranks / counted_s[step])).backward()
            loss_sums_s[step] += losses_n.detach().double().sum()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        grad_norms_s[step] = norm.full_tensor().double()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    dist.all_reduce(loss_sums_s)
    weights = {name: parameter.detach().full_tensor() for name, parameter in named}
    return {"loss": loss_sums_s / counted_s, "grad_norm": grad_norms_s} | weights


def rank_main(rank, ranks, meeting, out, curves, decays):
    """One rank, of all curves of as many ranks."""
    import torch.distributed as dist
    from safetensors.torch import save_file

    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    for curve in curves:
        tensors = train(out / f"seed-{curve['seed']}", curve, decays, rank)
        if rank == 0:
            save_file(tensors, out / curve["file"])
    dist.destroy_process_group()


def make(out, curves):
    import transformers
    from transformers import Trainer

    transformers.logging.disable_progress_bar()
    models = [make_seed(seed, out / f"seed-{seed}") for seed in range(SEEDS)]
    # Among them the tied head, which is a parameter already.
    decaying = Trainer.get_decay_parameter_names(None, models[0])
    decays = [name for name, _ in models[0].named_parameters() if name in decaying]
    # Ranks are forked from a process that has imported what they need, which takes seconds, and has computed
    # nothing: PyTorch's thread pool does not always survive a fork ("Invalid thread pool").
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.fsdp", "transformers.models.gpt_bigcode.modeling_gpt_bigcode"])
    for ranks in STRATEGIES:
        with tempfile.TemporaryDirectory() as directory:
            of_ranks = [curve for curve in curves if curve["ranks"] == ranks]
            arguments = (ranks, Path(directory) / "meeting", out, of_ranks, set(decays))
            processes = [
                context.Process(target=rank_main, args=(rank, *arguments), daemon=True) for rank in range(ranks)
            ]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
        codes = [process.exitcode for process in processes]
        if any(codes):
            raise SystemExit(f"ranks of {ranks} ended with exit codes {codes}")
    return {
        "decays": decays, "adamw": ADAMW, "max_grad_norm": MAX_GRAD_NORM, "steps": STEPS,
        "sequences": SEQUENCES, "accumulate": ACCUMULATE, "curves": curves,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory of the fixtures")
    parser.add_argument("--all", action="store_true", help="every strategy in both dtypes from every seed")
    arguments = parser.parse_args()
    beside = ("fsdp2_curves.py", "make_fixtures.py")
    sources = [Path(__file__).with_name(name) for name in beside]
    once(arguments.out, sources, lambda: make(arguments.out, plan(arguments.all)))


if __name__ == "__main__":
    main()
