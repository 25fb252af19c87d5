"""Texts to sequences in Python, as the Personal Copilot scripts of Hugging Face make them: our data pipeline is compared
with it.

    peer_pack.py DATASET TOKENIZER --sequence N [--buffer SEQUENCES]

Tokenises buffers of documents with `tokenizers`, rearranges half of the documents for infilling with NumPy, joins them
and cuts sequences. Prints a JSON object with the number of tokens in sequences, and the seconds without start-up.
"""

import argparse
import glob
import json
import os
import time

import numpy as np
import pyarrow
from tokenizers import Tokenizer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("dataset")
parser.add_argument("tokenizer")
parser.add_argument("--sequence", type=int, default=2048)
parser.add_argument("--buffer", type=int, default=1024, help="sequences that a buffer is meant to fill")
parser.add_argument("--fim-rate", type=float, default=0.5)
parser.add_argument("--fim-spm-rate", type=float, default=0.5)
args = parser.parse_args()

tokenizer = Tokenizer.from_file(args.tokenizer)
end, prefix_mark, middle_mark, suffix_mark = (
    tokenizer.token_to_id(name) for name in ("<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>")
)
random = np.random.RandomState(seed=0)


def rearranged(tokens):
    if random.binomial(1, args.fim_rate):
        low, high = sorted(random.randint(low=0, high=len(tokens) + 1, size=2))
        prefix, middle, suffix = (np.array(part, dtype=np.int64) for part in
                                  (tokens[:low], tokens[low:high], tokens[high:]))
        if random.binomial(1, args.fim_spm_rate):
            tokens = np.concatenate([[prefix_mark, suffix_mark], suffix, [middle_mark], prefix, middle])
        else:
            tokens = np.concatenate([[prefix_mark], prefix, [suffix_mark], suffix, [middle_mark], middle])
    return list(tokens) + [end]


def documents():
    for path in sorted(glob.glob(os.path.join(args.dataset, "train-*.arrow"))):
        with pyarrow.memory_map(path) as source:
            reader = pyarrow.ipc.open_file(source)
            for number in range(reader.num_record_batches):
                yield from reader.get_batch(number).column("content").to_pylist()


began = time.perf_counter()
characters_per_token = 3.6
wanted = args.sequence * characters_per_token * args.buffer
sequences = 0
source, more = documents(), True
while more:
    buffer, length = [], 0
    while length < wanted:
        try:
            buffer.append(next(source))
            length += len(buffer[-1])
        except StopIteration:
            more = False
            break
    tokens = []
    for encoding in tokenizer.encode_batch(buffer, add_special_tokens=False):
        tokens.extend(rearranged(encoding.ids))
    for start in range(0, len(tokens), args.sequence):
        row = tokens[start : start + args.sequence]
        if len(row) == args.sequence:
            np.array(row)
            sequences += 1
print(json.dumps({"tokens": sequences * args.sequence, "seconds": time.perf_counter() - began}))
