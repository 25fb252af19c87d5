"""Writes what bitsandbytes makes of quantised tensors on the CPU, for the Rust kernels to reproduce.

    make_quant_fixtures.py OUT_DIR

OUT_DIR/quant.safetensors holds the tensors and OUT_DIR/index.json, written last, names the cases;
README.md beside this file describes both. Idempotent like make_fixtures.py. Two things that one
must know of bitsandbytes 0.50 on a CPU with AVX-512:

* `dequantize_4bit` takes the scale of element (i, j) from `absmax[i * (columns // block) + j // block]`
  where `columns` is a multiple of 16 and `block` below 2048: wrong unless `columns` is a multiple of
  `block` or there is one row. So everything here is dequantised as one row.
* `quantize_blockwise` (8 bits: nested scales, AdamW8bit) looks codes up in a table of 65,536 equal
  steps from -1 to 1 and is not exact: 0 becomes 2.1e-5 of the block's largest value, and a value within
  1.6e-5 of the middle between two codes may take the farther one. CUDA takes the nearest. Hence
  `nearest8` below, and both results in the file.
"""

import argparse
import math
from pathlib import Path

from fixture_dir import once

KINDS = ("nf4", "fp4")
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
BLOCK8 = 256
ADAMW = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
ADAMW_STEPS, ADAMW_SIZE = 5, 5000  # below 4096 elements bitsandbytes keeps fp32 states


def nearest8(values, code):
    """8-bit codes of blocks of 256 by the nearest value of `code`, the lower one at the middle, and the blocks' scales."""
    import torch

    flat = values.float().flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK8)).view(-1, BLOCK8)
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1 / absmax.clamp(min=1e-38)).unsqueeze(1)).clamp(-1, 1)
    codes = torch.bucketize(scaled, (code[:-1] + code[1:]) / 2)
    return codes.to(torch.uint8).flatten()[: len(flat)].view(values.shape), absmax


def dequantize_4bit(codes, state, dtype):
    """bitsandbytes' dequantised tensor, computed as one row."""
    import torch
    from bitsandbytes import functional as F

    absmax = state.absmax
    if state.nested:
        absmax = F.dequantize_blockwise(absmax, state.state2) + state.offset
    row = (1, math.prod(state.shape))
    flat = torch.ops.bitsandbytes.dequantize_4bit(codes, absmax, state.blocksize, state.quant_type, row, dtype)
    return flat.view(state.shape)


def inputs(generator):
    """The tensors to quantise, by name, in fp32."""
    import torch
    from bitsandbytes import functional as F

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    # Every code, every middle between two codes, and its neighbours, in blocks of 64 whose largest value is 1.
    codes = [F.get_4bit_type(kind, "cpu").sort().values for kind in KINDS]
    middles = torch.cat([(code[:-1] + code[1:]) / 2 for code in codes])
    up, down = (torch.nextafter(middles, torch.full_like(middles, end)) for end in (2.0, -2.0))
    points = torch.cat([*codes, middles, up, down])
    points = torch.nn.functional.pad(points, (0, -len(points) % 63)).view(-1, 63)
    middles = torch.cat([torch.ones(len(points), 1), points], 1)

    outlier = 0.01 * normal(40, 128)
    outlier[17, 5] = -1000.0
    return {
        "normal": normal(96, 128),
        "zeros": torch.zeros(2, 100),
        "zero-blocks": torch.cat([normal(2, 64), torch.zeros(1, 64), normal(1, 64)]),
        "outlier": outlier,
        "denormal": normal(8, 64) * torch.logspace(-42, -36, 8).unsqueeze(1),
        "middles": middles,
        "middles-scaled": 0.3 * middles,
        "huge": 1e36 * normal(4, 96),
        "tiny": 1e-30 * normal(4, 96),
        "ladder": normal(16, 64) * torch.logspace(-6, 6, 16).unsqueeze(1),
        "line": normal(1, 1003),
        "one": normal(1, 1),
        "odd-rows": normal(3, 65),
    }


def four_bit(values, name, tensors):
    """All settings of the 4-bit kinds over one tensor."""
    import torch
    from bitsandbytes import functional as F

    cases = []
    for kind, block, double in ((k, b, d) for k in KINDS for b in BLOCKS for d in (False, True)):
        codes, state = F.quantize_4bit(values, blocksize=block, quant_type=kind, compress_statistics=double)
        case = f"{name}-{kind}-{block}" + ("-double" if double else "")
        made = {"codes": codes.flatten(), "f32": dequantize_4bit(codes, state, torch.float32)}
        made["bf16"] = made["f32"].bfloat16()
        # bitsandbytes' own, but for denormals, which AVX512_BF16 flushes.
        own = dequantize_4bit(codes, state, torch.bfloat16)
        assert own.equal(made["bf16"]) or name.startswith("denormal")
        if double:
            absmax = torch.ops.bitsandbytes.quantize_4bit(values, block, kind, torch.uint8)[1]
            near = nearest8(absmax - absmax.mean(), state.state2.code)[0]
            made |= {"absmax8": state.absmax, "absmax2": state.state2.absmax, "absmax8_nearest": near}
            made["offset"] = state.offset.reshape(1)
        else:
            made["absmax"] = state.absmax
        tensors |= {f"{case}.{part}": value for part, value in made.items()}
        cases.append({"name": case, "values": f"values.{name}", "kind": kind, "block": block, "double": double})
    return cases


def int8(values, name, tensors):
    """Row-wise 8-bit integers; `linear_*` is the weight that Linear8bitLt multiplies with when it trains on a CPU."""
    import torch
    from bitsandbytes import functional as F

    codes, scales, _ = F.int8_vectorwise_quant(values)
    made = {"codes": codes, "scales": scales, "f32": F.int8_vectorwise_dequant(codes, scales)}
    for short, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        made["linear_" + short] = codes.to(dtype).mul_(scales.unsqueeze(1).mul(1.0 / 127.0))
    tensors |= {f"int8-{name}.{part}": value for part, value in made.items()}
    return {"name": f"int8-{name}", "values": f"values.{name}"}


def blockwise8(values, code, name, tensors):
    """Block-wise 8-bit floats in blocks of 256."""
    from bitsandbytes import functional as F

    codes, state = F.quantize_blockwise(values, code=code, blocksize=BLOCK8)
    near, absmax = nearest8(values, code)
    made = {"values": values, "codes": codes, "absmax": absmax, "f32": F.dequantize_blockwise(codes, state)}
    assert absmax.equal(state.absmax)
    return {f"{name}.{part}": value for part, value in (made | {"nearest": near}).items()}


def adamw8(generator, code_of, tensors):
    """Steps of bitsandbytes' AdamW8bit, and of the same arithmetic with `nearest8` in place of its table."""
    import bitsandbytes as bnb
    import torch

    start = torch.randn(ADAMW_SIZE, generator=generator)
    spread = 10 ** (2 * torch.rand(ADAMW_SIZE, generator=generator) - 2)
    grads = spread * torch.randn(ADAMW_STEPS, ADAMW_SIZE, generator=generator)
    grads[:, 256:512] = 0.0
    parameter = torch.nn.Parameter(start.clone())
    optimizer = bnb.optim.AdamW8bit([parameter], **ADAMW)
    runs = {"bnb": [], "nearest": []}
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
        state = optimizer.state[parameter]
        step = (parameter.detach(), state["state1"], state["absmax1"], state["state2"], state["absmax2"])
        runs["bnb"].append([value.clone() for value in step])

    (beta1, beta2), lr = ADAMW["betas"], ADAMW["lr"]
    value, m, v = start.clone(), torch.zeros(ADAMW_SIZE), torch.zeros(ADAMW_SIZE)
    for step, grad in enumerate(grads, 1):
        m = m.mul(beta1).add(grad, alpha=1.0 - beta1)
        v = v.mul(beta2).addcmul(grad, grad, value=1.0 - beta2)
        denominator = (v.sqrt() / math.sqrt(1.0 - beta2**step)).add(ADAMW["eps"])
        value = value * (1.0 - lr * ADAMW["weight_decay"])
        value = value.addcdiv(m, denominator, value=-lr / (1.0 - beta1**step))
        states = [nearest8(m, code_of["signed"]), nearest8(v, code_of["unsigned"])]
        runs["nearest"].append([value, *states[0], *states[1]])
        m, v = (
            code_of[sign][codes.long()] * scales.repeat_interleave(BLOCK8)[:ADAMW_SIZE]
            for sign, (codes, scales) in zip(("signed", "unsigned"), states)
        )
    tensors |= {"adamw8.start": start, "adamw8.grads": grads}
    for run, steps in runs.items():
        for part, values in zip(("param", "exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax"), zip(*steps)):
            tensors[f"adamw8.{run}.{part}"] = torch.stack(values)


def make(out):
    import torch
    from bitsandbytes import functional as F
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(3000)
    code8 = {"signed": F.create_dynamic_map(signed=True), "unsigned": F.create_dynamic_map(signed=False)}
    tensors = {f"code8.{sign}": code for sign, code in code8.items()}
    tensors |= {f"code4.{kind}": F.get_4bit_type(kind, "cpu") for kind in KINDS}
    cases, int8_cases, eight_cases = [], [], []
    for name, values in inputs(generator).items():
        for short, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
            full = f"{name}-{short}"
            tensors[f"values.{full}"] = values.to(dtype)
            cases += four_bit(values.to(dtype), full, tensors)
            # Of denormals 127 / absmax overflows, of huge values code * absmax.
            if name not in ("denormal", "huge"):
                int8_cases.append(int8(values.to(dtype), full, tensors))
        for sign, code in code8.items():
            eight = f"{sign}8-{name}"
            tensors |= blockwise8(values if sign == "signed" else values.abs(), code, eight, tensors)
            eight_cases.append({"name": eight, "code": f"code8.{sign}"})
    adamw8(generator, code8, tensors)
    save_file({name: value.clone().contiguous() for name, value in tensors.items()}, out / "quant.safetensors")
    return {"four_bit": cases, "int8": int8_cases, "blockwise8": eight_cases, "adamw8": ADAMW}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory of the fixtures")
    out = parser.parse_args().out
    once(out, [Path(__file__)], lambda: make(out))


if __name__ == "__main__":
    main()
