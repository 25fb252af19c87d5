"""Small tokenizers in the ways of several families, and prompts as these families lay them out.

    make_tokenizers.py DIR

DIR/<family> holds `tokenizer.json` and `tokenizer_config.json`, trained on this project's documents, and `cases.json`:
a list of {before, after, plain, psm, spm}. `plain` are the tokens of `before` as a prompt. Prompts are put together from
the families' own descriptions.
"""

import argparse
import json
from pathlib import Path

from fixture_dir import once

ROOT = Path(__file__).parents[2]
WORDS = 700
TEXTS = [
    ("def add(a, b):\n    return ", "\n\nprint(add(1, 2))\n"),
    (" x = 1", " + y"),
    ("", "tail"),
    ("gr\u00f6\u00dfe = '\u6ce8'\n", "\tif x:  \n"),
    ("a  b   c", "   d"),
]
DEEPSEEK = ["<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581end\uff5c>"]
QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
        "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"]


def corpus():
    return [path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))]


def byte_level(split, added):
    """A byte-level vocabulary whose words are found by `split`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in split]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in added])
    return tokenizer


def save(tokenizer, directory, **config):
    directory.mkdir(parents=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def cases(directory, plain, psm, spm):
    rows = [
        dict(before=before, after=after, plain=plain(before), psm=psm(before, after), spm=spm(before, after))
        for before, after in TEXTS
    ]
    (directory / "cases.json").write_text(json.dumps(rows))


def laid_out(directory, tokenizer, marks, begin=()):
    """Prompts of a family with marks (prefix, suffix, middle), behind `begin`."""
    ids = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    prefix, suffix, middle = (tokenizer.token_to_id(mark) for mark in marks)
    begin = [tokenizer.token_to_id(token) for token in begin]
    cases(
        directory,
        lambda before: [*begin, *ids(before)] if before else [],
        lambda before, after: [*begin, prefix, *ids(before), suffix, *ids(after), middle],
        lambda before, after: [*begin, prefix, suffix, *ids(after), middle, *ids(before)],
    )


def qwen(out):
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer = byte_level([pattern], QWEN)
    save(tokenizer, out / "qwen", eos_token="<|endoftext|>", tokenizer_class="Qwen2Tokenizer")
    laid_out(out / "qwen", tokenizer, ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"])


def deepseek(out):
    """Its markers, and a beginning of text before every prompt."""
    from tokenizers import processors

    begin, end = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
    tokenizer = byte_level([r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"\p{N}"], [*DEEPSEEK, begin, end])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[begin, "$A"], special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    save(tokenizer, out / "deepseek", eos_token={"content": end}, tokenizer_class="LlamaTokenizerFast")
    hole, first, last = DEEPSEEK
    laid_out(out / "deepseek", tokenizer, [first, hole, last], begin=[begin])


def codellama(out):
    """SentencePiece's pairs: a text begins with a space of its own, a suffix does not (`encode_infilling` of Meta's code)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    marks = ["\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>", "\u2581<EOT>"]
    spaces = normalizers.Replace(pattern=" ", content="\u2581")

    def tokenizer(model, begins):
        made = Tokenizer(model)
        made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces]) if begins else spaces
        made.add_special_tokens(marks)
        made.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        return made

    def pairs(**more):
        return models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>", **more)

    trained = Tokenizer(pairs())
    trained.normalizer = spaces
    # Words, so that training ends; the vocabulary itself knows none.
    words = (word for text in corpus() for word in text.replace(" ", " \0").split("\0"))
    trained.train_from_iterator(words, trainers.BpeTrainer(vocab_size=WORDS + 260, special_tokens=first, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    learned = dict(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    whole, middle = tokenizer(pairs(**learned), True), tokenizer(pairs(**learned), False)
    whole.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 1)])
    for made in (whole, middle):
        made.add_special_tokens(["<unk>", "<s>", "</s>"])
    save(whole, out / "codellama", bos_token="<s>", eos_token="</s>", tokenizer_class="CodeLlamaTokenizer")

    begin, rest = (lambda text: whole.encode(text, add_special_tokens=False).ids), (lambda text: middle.encode(text).ids)
    pre, suf, mid, _ = (whole.token_to_id(mark) for mark in marks)
    cases(
        out / "codellama",
        lambda before: [1, *begin(before)] if before else [],
        lambda before, after: [1, pre, *begin(before), suf, *rest(after), mid],
        lambda before, after: [1, pre, suf, *rest(after), mid, *begin(before)],
    )


def make(out):
    for family in (qwen, deepseek, codellama):
        family(out)
    return {"tokenizers": ["qwen", "deepseek", "codellama"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory of the tokenizers")
    out = parser.parse_args().out
    once(out, [Path(__file__)], lambda: make(out))


if __name__ == "__main__":
    main()
