"""Whole training steps of transformers + torch on one device: autocast, clipping, fused AdamW."""

from contextlib import nullcontext

import peer


def main():
    args = peer.flags(__doc__)
    import torch

    torch.set_num_threads(args.threads)
    model = peer.build_model(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    tokens = peer.batches(args)

    def step():
        ids_bt = next(tokens)
        autocast = torch.autocast(args.device, torch.bfloat16) if args.precision == "bf16" else nullcontext()
        with autocast:
            loss = model(input_ids=ids_bt, labels=ids_bt).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss = loss.item()
        peer.synchronise(args)
        return {"tokens": ids_bt.numel(), "loss": loss, **peer.peak_memory(args)}

    parameters = sum(p.numel() for p in model.parameters())
    peer.serve({"parameters": parameters, "rss_bytes": peer.memory("VmRSS")}, step)


if __name__ == "__main__":
    main()
