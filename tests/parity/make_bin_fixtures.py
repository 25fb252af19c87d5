"""Writes models as PyTorch saved them before safetensors, beside the same in safetensors, and files that are refused.

    make_bin_fixtures.py DIR
    make_bin_fixtures.py --wide FILE    one tensor of more than 4 GB, of which almost all is a hole in the file

Idempotent, as make_fixtures.py is.

    DIR/index.json                 written last: generator, versions, models [name]
    DIR/<model>/bin                config.json and pytorch_model.bin, or shards of it and their index
    DIR/<model>/safetensors        as save_pretrained writes the same model
    DIR/refused/<case>.bin
"""

import argparse
import json
import os
import zipfile
from pathlib import Path

from fixture_dir import once
from make_fixtures import randomise

SHAPE = dict(vocab_size=128, n_positions=48, n_embd=48, n_head=4, n_layer=3, n_inner=None)
SHARDS = 3
WIDE_ELEMENTS = 2_400_000_000
WIDE_LAST = [1.5, -0.25, 3.0]


def with_masks(state):
    """The buffers that transformers saved with each block when StarCoder was published."""
    import torch

    mask = torch.ones(1, SHAPE["n_positions"], SHAPE["n_positions"]).tril().bool()
    for block in range(SHAPE["n_layer"]):
        state[f"transformer.h.{block}.attn.bias"] = mask
        state[f"transformer.h.{block}.attn.masked_bias"] = torch.tensor(-1e9)
    return state


def as_parameters(state):
    import torch

    return {name: torch.nn.Parameter(value, requires_grad=value.is_floating_point()) for name, value in state.items()}


def as_views(state):
    """Every tensor in one storage, each behind the one before it."""
    import torch

    flat = torch.cat([value.flatten() for value in state.values()])
    pieces = flat.split([value.numel() for value in state.values()])
    return {name: piece.view_as(value) for (name, value), piece in zip(state.items(), pieces)}


def save_sharded(state, directory):
    """As transformers cut models: by names, with an index; the tied head in the last file, its twin in the first."""
    import torch

    names = list(state)
    size = -(-len(names) // SHARDS)
    weight_map = {}
    for shard in range(SHARDS):
        file = f"pytorch_model-{shard + 1:05}-of-{SHARDS:05}.bin"
        part = names[shard * size : (shard + 1) * size]
        torch.save({name: state[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(value.nbytes for value in state.values())}, "weight_map": weight_map}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=2))


def save_whole(state, directory):
    import torch

    torch.save(state, directory / "pytorch_model.bin")


MODELS = {
    "fp32": ("float32", lambda state: state, save_whole),
    "bf16-sharded": ("bfloat16", with_masks, save_sharded),
    "fp16-parameters": ("float16", lambda state: as_parameters(with_masks(state)), save_whole),
    "fp32-views": ("float32", as_views, save_whole),
}


def make_model(name, seed, out):
    import torch
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

    dtype, prepare, save = MODELS[name]
    config = GPTBigCodeConfig(
        **SHAPE, activation_function="gelu_pytorch_tanh", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        multi_query=True, bos_token_id=0, eos_token_id=0,
    )
    model = GPTBigCodeForCausalLM(config)
    randomise(model, torch.Generator().manual_seed(seed))
    model.to(getattr(torch, dtype))
    model.save_pretrained(out / name / "safetensors", safe_serialization=True)
    directory = out / name / "bin"
    directory.mkdir()
    state = model.state_dict()
    assert state["lm_head.weight"].data_ptr() == state["transformer.wte.weight"].data_ptr()
    save(prepare(state), directory)
    for file in ("config.json", "generation_config.json"):
        (directory / file).write_bytes((out / name / "safetensors" / file).read_bytes())


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def rewrite(source, out, compression=zipfile.ZIP_STORED, **contents):
    """The archive again, with some files' contents replaced."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(out, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, contents.get(name.rsplit("/", 1)[1], old.read(name)))


def make_refused(out):
    import torch

    out.mkdir()
    tensor = torch.arange(6.0).view(2, 3)
    plain = out / "plain.bin"
    torch.save({"weight": tensor}, plain)
    torch.save({"weight": tensor}, out / "legacy.bin", _use_new_zipfile_serialization=False)
    torch.save({"weight": tensor.T}, out / "strided.bin")
    torch.save({"weight": tensor.to(torch.int64)}, out / "integers.bin")
    torch.save({"state_dict": {"weight": tensor}, "epoch": 3}, out / "wrapped.bin")
    torch.save({"weight": tensor, "call": Calls(os.system, "touch was-executed")}, out / "system.bin")
    torch.save({"weight": tensor, "call": Calls(getattr, tensor, "shape")}, out / "getattr.bin")
    torch.save(torch.nn.Linear(2, 2), out / "module.bin")
    rewrite(plain, out / "big-endian.bin", byteorder="big")
    rewrite(plain, out / "compressed.bin", compression=zipfile.ZIP_DEFLATED)


def make_wide(path):
    import torch

    with torch.serialization.skip_data():
        torch.save({"weight": torch.empty(WIDE_ELEMENTS, dtype=torch.float16), "after": torch.empty(3)}, path)
    reader = torch._C.PyTorchFileReader(str(path))
    with open(path, "r+b") as file:
        for record, elements, dtype in (("data/0", WIDE_ELEMENTS, torch.float16), ("data/1", 3, torch.float32)):
            last = torch.tensor(WIDE_LAST, dtype=dtype).numpy().tobytes()
            file.seek(reader.get_record_offset(record) + elements * dtype.itemsize - len(last))
            file.write(last)


def make(out):
    import transformers

    transformers.logging.disable_progress_bar()
    for i, name in enumerate(MODELS):
        make_model(name, 3000 + i, out)
    make_refused(out / "refused")
    return {"models": list(MODELS)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", help="directory of the fixtures")
    parser.add_argument("--wide", type=Path, help="write this file alone")
    arguments = parser.parse_args()
    if arguments.wide:
        make_wide(arguments.wide)
    else:
        here = Path(__file__)
        once(arguments.out, [here, here.with_name("make_fixtures.py")], lambda: make(arguments.out))


if __name__ == "__main__":
    main()
