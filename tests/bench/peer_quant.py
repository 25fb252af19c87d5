"""bitsandbytes quantising or dequantising one 4096 x 4096 bf16 weight: each `go` is one call.

NF4 in blocks of 64 with double quantisation; dequantised to bf16. "tokens" and "parameters" count the
weights, the loss is 0. The shape flags have no effect; --threads and --device have.
"""

import logging

import peer

SIDE = 4096


def add_flags(parser):
    parser.add_argument("--mode", choices=("quantize", "dequantize"), default="dequantize")


def main():
    args = peer.flags(__doc__, preset="qlora", add=add_flags)
    # It says on import that an optional package is not there.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import torch
    from bitsandbytes import functional as F

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    weight = torch.empty(SIDE, SIDE, dtype=torch.bfloat16, device=args.device).normal_(0.0, 0.02)

    def quantize():
        return F.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)

    codes, state = quantize()

    def step():
        if args.mode == "quantize":
            quantize()
        else:
            assert F.dequantize_4bit(codes, state).dtype == torch.bfloat16
        peer.synchronise(args)
        return {"tokens": weight.numel(), "loss": 0.0, **peer.peak_memory(args)}

    peer.serve({"parameters": weight.numel(), "rss_bytes": peer.memory("VmRSS")}, step)


if __name__ == "__main__":
    main()
