"""Writes random tiny models of every family but StarCoder's, and what transformers and peft compute with them.

    make_family_fixtures.py DIR [--seed SEED]

The format is that of make_fixtures.py, in DIR/plain, and of make_qlora_fixtures.py, in DIR/adapters. Configurations are
drawn: SEED draws others. `parameters` of the index holds what transformers counts of published shapes.
"""

import argparse
import json
import random
import warnings
from pathlib import Path

from fixture_dir import once
from make_fixtures import make_model
from make_qlora_fixtures import make_adapted

DRAWS = 3
# bitsandbytes on a CPU is right for widths that are multiples of this.
ADAPTED_WIDTH = 64
VARIANTS = [dict(name="plain", base="plain"), dict(name="nf4-double", base="nf4-64-double")]
ROPES = {
    "default": {},
    "linear": dict(factor=4.0),
    "dynamic": dict(factor=2.0),
    "yarn": dict(factor=4.0, original_max_position_embeddings=16),
    "llama3": dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
}


def heads(draw):
    """Width, query heads and key-value heads."""
    kv_heads = draw.choice([1, 2, 3])
    count = kv_heads * draw.choice([1, 2, 4])
    return dict(hidden_size=count * draw.choice([8, 16, 24]), num_attention_heads=count, num_key_value_heads=kv_heads)


def rotary(draw, kind, **more):
    """What all families but GPTBigCode share."""
    rope = dict(rope_type=kind, rope_theta=draw.choice([1e4, 1e6]), **ROPES[kind])
    return dict(
        vocab_size=draw.randrange(90, 220), num_hidden_layers=draw.choice([1, 2, 3]), max_position_embeddings=64,
        intermediate_size=draw.randrange(17, 90), rope_parameters=rope, attention_dropout=0.0, bos_token_id=0,
        eos_token_id=0, **{**heads(draw), **more},
    )


def gpt_bigcode(draw, i):
    """With multi-head attention; one key-value head is what make_fixtures.py has."""
    from transformers import GPTBigCodeConfig

    shape = heads(draw)
    return GPTBigCodeConfig(
        vocab_size=draw.randrange(90, 220), n_positions=64, n_embd=shape["hidden_size"], n_layer=draw.choice([1, 2, 3]),
        n_head=shape["num_attention_heads"], activation_function=draw.choice(["gelu", "gelu_pytorch_tanh"]),
        tie_word_embeddings=i % 2 == 0, multi_query=False, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0,
    )


def llama(draw, i):
    from transformers import LlamaConfig

    return LlamaConfig(
        **rotary(draw, ["default", "yarn", "llama3"][i % 3]), tie_word_embeddings=i % 2 == 1,
        attention_bias=i % 3 == 1, mlp_bias=i % 3 == 2,
    )


def own_width(draw, i):
    """A Llama whose heads together are wider than the model."""
    from transformers import LlamaConfig

    shape = dict(hidden_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=16 + 4 * i)
    return LlamaConfig(**rotary(draw, "dynamic", **shape))


def deepseek(draw, i):
    """DeepSeek-Coder: a Llama whose positions are divided."""
    from transformers import LlamaConfig

    return LlamaConfig(**rotary(draw, "linear"), rms_norm_eps=1e-6)


def decicoder(draw, i):
    """Written as a Llama; `model_type` is changed afterwards."""
    return deepseek(draw, i) if i else llama(draw, 0)


def qwen2(draw, i):
    from transformers import Qwen2Config

    window = dict(use_sliding_window=True, sliding_window=7, max_window_layers=i - 1) if i else {}
    return Qwen2Config(**rotary(draw, ["default", "yarn", "default"][i % 3]), tie_word_embeddings=i % 2 == 0, **window)


def starcoder2(draw, i):
    from transformers import Starcoder2Config

    return Starcoder2Config(
        **rotary(draw, "default"), sliding_window=[None, 5, 11][i % 3], use_bias=i % 2 == 0,
        tie_word_embeddings=i % 3 != 2, residual_dropout=0.0, embedding_dropout=0.0,
        hidden_act=draw.choice(["gelu", "gelu_pytorch_tanh"]),
    )


FAMILIES = [gpt_bigcode, llama, own_width, deepseek, decicoder, qwen2, starcoder2]


def rename(directory):
    """Says that the model is a DeciCoder, as its publisher does."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config |= dict(model_type="decicoder", naive_attention_prefill=False, architectures=["DeciCoderForCausalLM"])
    path.write_text(json.dumps(config, indent=2))


def widened(config):
    """The same with widths that bitsandbytes takes."""
    if config.model_type == "gpt_bigcode":
        config.update(dict(n_embd=2 * ADAPTED_WIDTH, n_head=4, n_layer=2, n_inner=192))
        config.num_key_value_heads = 4
    else:
        config.update(dict(
            hidden_size=2 * ADAPTED_WIDTH, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
            intermediate_size=192, head_dim=32,
        ))
        if hasattr(config, "layer_types"):
            config.layer_types = ["full_attention", "sliding_attention" if config.sliding_window else "full_attention"]
    return config


def published():
    """What transformers counts of published shapes, each tied parameter once."""
    import torch
    from transformers import AutoModelForCausalLM, GPTBigCodeConfig, LlamaConfig, Qwen2Config, Starcoder2Config

    def llama_of(vocab, layers, width, heads, kv_heads, inner):
        return LlamaConfig(
            vocab_size=vocab, num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads,
            num_key_value_heads=kv_heads, intermediate_size=inner,
        )

    def qwen2_of(vocab, tied, layers, width, heads, kv_heads, inner):
        return Qwen2Config(
            vocab_size=vocab, num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads,
            num_key_value_heads=kv_heads, intermediate_size=inner, tie_word_embeddings=tied,
        )

    def starcoder2_of(tied, layers, width, heads, kv_heads):
        return Starcoder2Config(
            num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, num_key_value_heads=kv_heads,
            intermediate_size=4 * width, tie_word_embeddings=tied,
        )

    def starcoder_of(layers, width, heads):
        return GPTBigCodeConfig(vocab_size=49152, n_positions=8192, n_layer=layers, n_embd=width, n_head=heads)

    shapes = {
        "starcoderbase-1b": starcoder_of(24, 2048, 16),
        "starcoderbase-3b": starcoder_of(36, 2816, 22),
        "starcoderbase-7b": starcoder_of(42, 4096, 32),
        "starcoder": starcoder_of(40, 6144, 48),
        "decicoder-1b": llama_of(49152, 20, 2048, 32, 4, 5888),
        "starcoder2-3b": starcoder2_of(True, 30, 3072, 24, 2),
        "starcoder2-7b": starcoder2_of(True, 32, 4608, 36, 4),
        "starcoder2-15b": starcoder2_of(False, 40, 6144, 48, 4),
        "qwen2.5-coder-0.5b": qwen2_of(151936, True, 24, 896, 14, 2, 4864),
        "qwen2.5-coder-1.5b": qwen2_of(151936, True, 28, 1536, 12, 2, 8960),
        "qwen2.5-coder-3b": qwen2_of(151936, True, 36, 2048, 16, 2, 11008),
        "qwen2.5-coder-7b": qwen2_of(152064, False, 28, 3584, 28, 4, 18944),
        "qwen2.5-coder-14b": qwen2_of(152064, False, 48, 5120, 40, 8, 13824),
        "qwen2.5-coder-32b": qwen2_of(152064, False, 64, 5120, 40, 8, 27648),
        "codellama-7b": llama_of(32016, 32, 4096, 32, 32, 11008),
        "codellama-13b": llama_of(32016, 40, 5120, 40, 40, 13824),
        "codellama-34b": llama_of(32000, 48, 8192, 64, 8, 22016),
        "deepseek-coder-1.3b": llama_of(32256, 24, 2048, 16, 16, 5504),
        "deepseek-coder-6.7b": llama_of(32256, 32, 4096, 32, 32, 11008),
        "deepseek-coder-33b": llama_of(32256, 62, 7168, 56, 8, 19200),
    }
    counts = {}
    for name, config in shapes.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        counts[name] = sum(parameter.numel() for parameter in model.parameters())
    return counts


def make(out, seed):
    import torch
    import transformers

    torch.use_deterministic_algorithms(True)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)
    models, adapted = [], []
    for at, family in enumerate(FAMILIES):
        for i in range(DRAWS):
            draw = random.Random(f"{seed} {family.__name__} {i}")
            case = dict(name=f"{family.__name__}-{i}", batch=2, tokens=draw.randrange(20, 40))
            models.append(make_model(family(draw, i), case, 6000 + 100 * seed + 10 * at + i, out / "plain"))
            if family is decicoder:
                rename(out / "plain" / case["name"])
        if family is own_width:
            continue
        draw = random.Random(f"{seed} {family.__name__} adapted")
        case = dict(name=family.__name__, batch=2, tokens=draw.randrange(20, 40))
        seen = make_adapted(widened(family(draw, 1)), case, VARIANTS, 7000 + 100 * seed + at, out / "adapters")
        adapted.append(seen)
        if family is decicoder:
            rename(out / "adapters" / case["name"])
    return {
        "models": models,
        "adapted": adapted,
        "variants": [dict(variant, directory=variant["name"]) for variant in VARIANTS],
        "parameters": published() if seed == 0 else {},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory of the fixtures")
    parser.add_argument("--seed", type=int, default=0, help="draws other configurations")
    args = parser.parse_args()
    beside = ("make_family_fixtures.py", "make_qlora_fixtures.py", "make_quant_fixtures.py", "make_fixtures.py")
    once(args.out, [Path(__file__).with_name(name) for name in beside], lambda: make(args.out, args.seed))


if __name__ == "__main__":
    main()
