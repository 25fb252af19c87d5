"""Loads a tokenizer directory as users do and prints what it makes of some texts, as JSON."""

import json
import sys

from transformers import AutoTokenizer, GPT2TokenizerFast

MARKERS = ["<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>"]


def describe(tokenizer, texts):
    ids = [tokenizer(text)["input_ids"] for text in texts]
    return {
        "ids": ids,
        "decoded": [tokenizer.decode(i) for i in ids],
        "special": tokenizer("".join(MARKERS))["input_ids"],
        "length": len(tokenizer),
    }


def main():
    directory, texts = sys.argv[1], json.loads(sys.argv[2])
    classes = {"AutoTokenizer": AutoTokenizer, "GPT2TokenizerFast": GPT2TokenizerFast}
    print(json.dumps({name: describe(c.from_pretrained(directory), texts) for name, c in classes.items()}))


if __name__ == "__main__":
    main()
