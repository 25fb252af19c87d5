"""Trains a small model on this project's sources, and writes what transformers' `generate` completes with it.

    make_completions.py DIR

DIR gets `model` (with its tokenizer), `adapter` (random, large enough to change what is said), and `completions.json`:
`prompts` (lists of token ids), and under `base` and `adapter` for each prompt `ids`, the tokens that greedy `generate`
made in fp32, and `margins`, how far the best logit was above the second best for each. Idempotent.
"""

import json
import sys
from pathlib import Path

from fixture_dir import once

ROOT = Path(__file__).resolve().parents[2]
STEPS, ROWS, LENGTH = 150, 8, 128
PROMPTS, NEW = 100, 24
SPECIAL = ["<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>"]


def sources():
    return sorted((ROOT / "proto/src").rglob("*.rs"))


def train_tokenizer(texts, directory):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": SPECIAL[0], "bos_token": SPECIAL[0]}))
    return tokenizer


def train(tokenizer, texts, directory):
    import torch
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

    torch.manual_seed(0)
    config = GPTBigCodeConfig(
        vocab_size=tokenizer.get_vocab_size(), n_positions=256, n_embd=128, n_layer=4, n_head=4, n_inner=512,
        activation_function="gelu_pytorch_tanh", bos_token_id=0, eos_token_id=0, attn_pdrop=0.0, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_implementation="eager",
    )
    model = GPTBigCodeForCausalLM(config).train()
    stream = torch.tensor([id for text in texts for id in [*tokenizer.encode(text).ids, 0]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 20)
        starts = torch.randint(len(stream) - LENGTH, (ROWS,))
        ids = torch.stack([stream[start:start + LENGTH] for start in starts])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(directory)
    return model, loss.item()


def complete(model, prompts):
    import torch

    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            made = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0,
                output_logits=True, return_dict_in_generate=True,
            )
        best = [logits[0].topk(2).values for logits in made.logits]
        rows.append({"ids": made.sequences[0, len(prompt):].tolist(),
                     "margins": [(first - second).item() for first, second in best]})
    return rows


def add_adapter(model, directory):
    import peft
    import torch

    torch.manual_seed(1)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn", "c_proj", "c_fc"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.02)
    adapted.eval().save_pretrained(directory)
    return adapted


def make(out):
    import random

    texts = [path.read_text(encoding="utf-8") for path in sources()]
    tokenizer = train_tokenizer(texts, out / "model")
    model, loss = train(tokenizer, texts, out / "model")
    draw = random.Random(2)
    prompts = []
    while len(prompts) < PROMPTS:
        ids = tokenizer.encode(draw.choice(texts)).ids
        start, length = draw.randrange(len(ids)), draw.randrange(8, 180)
        if start + length <= len(ids):
            prompts.append(ids[start:start + length])
    # As an editor asks: what was asked a while before, and a little more.
    for at in range(20, PROMPTS, 4):
        prompts[at] = [*prompts[at - 20][:180], *prompts[at][:3]]
    completions = {"prompts": prompts, "base": complete(model, prompts)}
    completions["adapter"] = complete(add_adapter(model, out / "adapter"), prompts)
    (out / "completions.json").write_text(json.dumps(completions))
    return {"loss": loss}


def main():
    out = Path(sys.argv[1]).resolve()
    once(out, [Path(__file__), *sources()], lambda: make(out))


main()
