"""Plain reference of the default packing: the whole stream is made, then cut.

Prints, as JSON, the first --count windows of a split. Where the Rust side computes places from
lengths, this lays tokens end to end; the counter-based random numbers are written out again.
"""

import argparse
import json

from common import read_texts
from tokenizers import Tokenizer

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
SPLITS = {"train": 0, "validation": 1}
DOCUMENT_ORDER, WINDOW_ORDER, FIM = 1, 2, 3
MIN_INFILL = 4


def mix(z):
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


class Draws:
    def __init__(self, seed, purpose, *position):
        self.state = mix((seed + GOLDEN) & MASK)
        for part in (purpose, *position):
            self.state = mix(self.state ^ mix((part + GOLDEN) & MASK))

    def bits(self):
        self.state = (self.state + GOLDEN) & MASK
        return mix(self.state)

    def below(self, bound):
        while True:
            product = self.bits() * bound
            if product & MASK >= 2**64 % bound:
                return product >> 64

    def chance(self, p):
        return (self.bits() >> 11) / 2**53 < p

    def permutation(self, n):
        order = list(range(n))
        for i in range(n - 1, 0, -1):
            j = self.below(i + 1)
            order[i], order[j] = order[j], order[i]
        return order


class Packer:
    def __init__(self, args):
        self.args = args
        self.split = SPLITS[args.split]
        tokenizer = Tokenizer.from_file(args.tokenizer)
        # Special tokens spelt out in a file are text.
        tokenizer.encode_special_tokens = True
        self.eos, self.prefix, self.middle, self.suffix, self.pad = (
            tokenizer.token_to_id(t)
            for t in ("<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>")
        )
        self.documents = [
            tokenizer.encode(text, add_special_tokens=False).ids for text in read_texts(args.dataset, args.split)
        ]

    def rearrange(self, tokens, draws):
        a, b = draws.below(len(tokens) + 1), draws.below(len(tokens) + 1)
        low, high = min(a, b), max(a, b)
        prefix, middle, suffix = tokens[:low], tokens[low:high], tokens[high:]
        if draws.chance(self.args.fim_spm_rate):
            return [self.prefix, self.suffix, *suffix, self.middle, *prefix, *middle]
        return [self.prefix, *prefix, self.suffix, *suffix, self.middle, *middle]

    def order(self, epoch):
        n = len(self.documents)
        if self.args.split == "validation":
            return range(n)
        return Draws(self.args.seed, DOCUMENT_ORDER, self.split, epoch).permutation(n)

    def stream_of_documents(self, epochs):
        """Yields (epoch, token) with whole documents rearranged."""
        for epoch in range(epochs):
            for document in self.order(epoch):
                tokens = self.documents[document]
                draws = Draws(self.args.seed, FIM, self.split, epoch, document)
                if self.args.fim_rate > 0 and draws.chance(self.args.fim_rate):
                    tokens = self.rearrange(tokens, draws)
                yield from ((epoch, token) for token in [*tokens, self.eos])

    def windows_of_documents(self, epochs):
        """(epoch in which the window begins, tokens), in stream order."""
        stream = list(self.stream_of_documents(epochs))
        size = self.args.sequence_tokens
        for i in range(0, len(stream), size):
            yield stream[i][0], [token for _, token in stream[i : i + size]]

    def windows_of_parts(self, epochs):
        """The same with every part rearranged inside its window."""
        size = self.args.sequence_tokens
        window, began = [], 0
        for epoch in range(epochs):
            for document in self.order(epoch):
                rest = [*self.documents[document], self.eos]
                length = len(rest)
                while rest:
                    if not window:
                        began = epoch
                    free = size - len(window)
                    draws = Draws(self.args.seed, FIM, self.split, epoch, document, length - len(rest))
                    content = min(len(rest) - 1, free - 3)
                    if content >= MIN_INFILL and self.args.fim_rate > 0 and draws.chance(self.args.fim_rate):
                        window += self.rearrange(rest[:content], draws)
                        rest = rest[content:]
                        if len(rest) == 1 and len(window) < size:
                            window.append(rest.pop())
                    else:
                        window += rest[:free]
                        rest = rest[free:]
                    if len(window) == size:
                        yield began, window
                        window = []
        if window:
            yield began, window

    def served(self, epochs):
        cut = self.windows_of_parts if self.args.fim_level == "window" else self.windows_of_documents
        by_epoch = [[] for _ in range(epochs)]
        for epoch, window in cut(epochs):
            by_epoch[epoch].append(window)
        if self.args.split == "validation":
            last = by_epoch[0][-1]
            last += [self.pad] * (self.args.sequence_tokens - len(last))
            return by_epoch[0]
        # The last epoch's windows may lack what follows; they are not compared.
        out = []
        for epoch, windows in enumerate(by_epoch[:-1]):
            order = Draws(self.args.seed, WINDOW_ORDER, self.split, epoch).permutation(len(windows))
            out += [windows[i] for i in order]
        return out


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--split", choices=list(SPLITS), required=True)
    parser.add_argument("--fim-level", choices=["document", "window"], required=True)
    parser.add_argument("--sequence-tokens", type=int, required=True)
    parser.add_argument("--fim-rate", type=float, required=True)
    parser.add_argument("--fim-spm-rate", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--epochs", type=int, required=True, help="epochs served: one fewer in training")
    args = parser.parse_args()
    print(json.dumps(Packer(args).served(1 if args.split == "validation" else args.epochs)))


if __name__ == "__main__":
    main()
