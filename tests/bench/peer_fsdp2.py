"""Whole training steps of PyTorch FSDP2: fully_shard per block, bf16 compute, fp32 reduction.

gloo between processes on CPU, NCCL on GPUs. `--batch` is one rank's.
"""

import multiprocessing
import socket

import peer


def rank_main(rank, port, args, pipe):
    """One rank: takes a step for each message, answers with its loss and memory."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.set_num_threads(args.threads)
    if args.device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if args.device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=args.ranks)
    mesh = init_device_mesh(args.device, (args.ranks,))

    model = peer.build_model(args)
    parameters = sum(p.numel() for p in model.parameters())
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    tokens = peer.batches(args, rank)
    pipe.send({"parameters": parameters, "rss_bytes": peer.memory("VmRSS")})

    while pipe.recv():
        ids_bt = next(tokens)
        loss = model(input_ids=ids_bt, labels=ids_bt).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss = loss.item()
        peer.synchronise(args)
        pipe.send({"tokens": ids_bt.numel(), "loss": loss, **peer.peak_memory(args)})
    dist.destroy_process_group()


def main():
    args = peer.flags(__doc__)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    pipes, ranks = [], []
    for rank in range(args.ranks):
        ours, theirs = context.Pipe()
        process = context.Process(target=rank_main, args=(rank, port, args, theirs), daemon=True)
        process.start()
        # Closed here, so that a rank that dies ends the wait below with an EOFError.
        theirs.close()
        pipes.append(ours)
        ranks.append(process)

    def step():
        for pipe in pipes:
            pipe.send(True)
        replies = [pipe.recv() for pipe in pipes]
        device_bytes = [reply["peak_device_bytes"] for reply in replies]
        return {
            "tokens": sum(reply["tokens"] for reply in replies),
            "loss": sum(reply["loss"] for reply in replies) / len(replies),
            "peak_rss_bytes": max(reply["peak_rss_bytes"] for reply in replies),
            "peak_device_bytes": max(device_bytes) if None not in device_bytes else None,
        }

    ready = [pipe.recv() for pipe in pipes]
    peer.serve(ready[0], step)
    for pipe in pipes:
        pipe.send(False)
    for process in ranks:
        process.join()


if __name__ == "__main__":
    main()
