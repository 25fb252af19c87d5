"""Plain reference of the seed-compatible packing, written from its description.

Reads a dataset directory and a tokenizer.json and prints, as JSON, the first --count windows of a
split: the original's FIM transform (NumPy RandomState), buffers by characters, dropped tails,
random stream that begins anew per buffer, and Python's shuffle. Uses NumPy and Python's own
generators, so that it checks those of the Rust side.
"""

import argparse
import json
import random

import numpy as np
from common import read_texts
from tokenizers import Tokenizer


def characters_per_token(texts, tokenizer):
    characters = tokens = 0
    for text in texts[:400]:
        characters += len(text)
        tokens += len(tokenizer.encode(text).tokens)
    return characters / tokens


def permute(sample, rng, prefix_id, middle_id, suffix_id, fim_rate, fim_spm_rate):
    if not rng.binomial(1, fim_rate):
        return sample
    low, high = sorted(rng.randint(low=0, high=len(sample) + 1, size=2))
    prefix, middle, suffix = sample[:low], sample[low:high], sample[high:]
    if rng.binomial(1, fim_spm_rate):
        return [prefix_id, suffix_id, *suffix, middle_id, *prefix, *middle]
    return [prefix_id, *prefix, suffix_id, *suffix, middle_id, *middle]


def windows(texts, tokenizer, ratio, args):
    infinite = args.split == "train"
    buffer_characters = args.sequence_tokens * ratio * args.buffer_sequences
    eos, prefix_id, middle_id, suffix_id = (
        tokenizer.token_to_id(t) for t in ("<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>")
    )
    shuffler = random.Random()
    shuffler.seed(args.seed)
    iterator = iter(texts)
    more = True
    while more:
        buffer, characters = [], 0
        while characters < buffer_characters:
            try:
                buffer.append(next(iterator))
                characters += len(buffer[-1])
            except StopIteration:
                if not infinite:
                    more = False
                    break
                iterator = iter(texts)
        stream = []
        rng = np.random.RandomState(seed=args.seed)
        for encoding in tokenizer.encode_batch(buffer):
            tokens = encoding.ids
            if args.fim_rate > 0:
                tokens = permute(tokens, rng, prefix_id, middle_id, suffix_id, args.fim_rate, args.fim_spm_rate)
            stream.extend(tokens + [eos])
        size = args.sequence_tokens
        examples = [stream[i : i + size] for i in range(0, len(stream), size)]
        examples = [example for example in examples if len(example) == size]
        shuffler.shuffle(examples)
        yield from examples


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--split", choices=["train", "validation"], required=True)
    parser.add_argument("--sequence-tokens", type=int, required=True)
    parser.add_argument("--buffer-sequences", type=int, default=1024)
    parser.add_argument("--fim-rate", type=float, required=True)
    parser.add_argument("--fim-spm-rate", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--count", type=int, required=True)
    args = parser.parse_args()

    tokenizer = Tokenizer.from_file(args.tokenizer)
    train = read_texts(args.dataset, "train")
    ratio = characters_per_token(train, tokenizer)
    texts = read_texts(args.dataset, args.split)
    out = []
    for window in windows(texts, tokenizer, ratio, args):
        if len(out) == args.count:
            break
        out.append([int(token) for token in window])
    print(json.dumps(out))


if __name__ == "__main__":
    main()
