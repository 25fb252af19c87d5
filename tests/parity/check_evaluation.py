"""Computes with transformers what `worker evaluate repo` computed, and says how far the two are apart.

    check_evaluation.py MODEL FILES EVALUATION [--adapter ADAPTER] [--teach DIR]

FILES is a JSON list of {"repo_id", "file_path", "content"}. Prints `loss`, the largest difference of a file's mean loss;
`files`; `holes`, how many; `differing`, the holes whose completion is another although no logit was near a second one;
`exact`, how many completions are what stood there. DIR gets the model after it was taught what stands in the holes.
"""

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import GPTBigCodeForCausalLM

EOS, PREFIX, MIDDLE, SUFFIX = 0, 1, 2, 3
TIE = 1e-3
TAUGHT_LOSS = 0.02
MOST_TEACHING_STEPS = 600


def load(model, adapter):
    loaded = GPTBigCodeForCausalLM.from_pretrained(model, attn_implementation="eager", dtype=torch.float32)
    if adapter:
        import peft

        loaded = peft.PeftModel.from_pretrained(loaded, adapter)
    return loaded.eval()


def loss_of(model, ids, window):
    total = 0.0
    for first in range(0, len(ids) - 1, window):
        piece = torch.tensor([ids[first:first + window + 1]])
        with torch.no_grad():
            logits = model(input_ids=piece[:, :-1]).logits[0].double()
        total += torch.nn.functional.cross_entropy(logits, piece[0, 1:], reduction="sum").item()
    return total


def closing(text):
    depth = 0
    for at, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if depth < 0:
            return text[:at]
    return text


def complete(model, tokenizer, before, after, kind, most_new):
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    ids = [PREFIX, SUFFIX, *encode(after), MIDDLE, *encode(before)]
    made, near = [], False
    while len(made) < most_new:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + made])).logits[0, -1]
        best = logits.topk(2)
        near |= (best.values[0] - best.values[1]).item() < TIE
        token = best.indices[0].item()
        if token <= 4:
            break
        made.append(token)
        if kind == "single_line" and "\n" in tokenizer.decode(made):
            break
    text = tokenizer.decode(made)
    if kind == "single_line":
        text = text.split("\n")[0]
    return (closing(text) if kind == "call_arguments" else text), near, len(ids)


def teach(model, tokenizer, holes, directory):
    """Trains on the holes, laid out as they are asked, until they are known: how many steps that takes, rounding decides."""
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    rows = [
        ([PREFIX, SUFFIX, *encode(after), MIDDLE, *encode(before)], [*encode(truth), EOS]) for before, truth, after in holes
    ]
    longest = max(len(prompt) + len(truth) for prompt, truth in rows)
    ids, labels = torch.zeros(len(rows), longest, dtype=torch.long), torch.full((len(rows), longest), -100)
    for row, (prompt, truth) in enumerate(rows):
        ids[row, :len(prompt) + len(truth)] = torch.tensor(prompt + truth)
        labels[row, len(prompt):len(prompt) + len(truth)] = torch.tensor(truth)
    # No dropout: `eval` does not keep a model from learning.
    optimizer = torch.optim.AdamW(model.eval().parameters(), lr=3e-3)
    for _ in range(MOST_TEACHING_STEPS):
        loss = model(input_ids=ids, labels=labels).loss
        if loss.item() < TAUGHT_LOSS:
            return model.save_pretrained(directory)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    raise SystemExit(f"not taught after {MOST_TEACHING_STEPS} steps: loss {loss.item()}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("files", type=Path)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("--adapter")
    parser.add_argument("--teach")
    args = parser.parse_args()
    model = load(args.model, args.adapter)
    tokenizer = Tokenizer.from_file(f"{args.model}/tokenizer.json")
    files = {f"{f['repo_id']}/{f['file_path']}": f["content"] for f in json.loads(args.files.read_text())}
    found = json.loads((args.evaluation / "evaluation.json").read_text())
    protocol = found["protocol"]
    worst = 0.0
    for file in found["files"]:
        ids = [EOS, *tokenizer.encode(files[file["id"]], add_special_tokens=False).ids, EOS]
        assert file["tokens"] == len(ids) - 1, file
        loss = loss_of(model, ids, protocol["window_tokens"])
        worst = max(worst, abs(loss - file["loss_sum"]) / file["tokens"])
    filled = [json.loads(line) for line in (args.evaluation / "holes.jsonl").open(encoding="utf-8")]
    differing, exact, window, asked = [], 0, protocol["window_tokens"], []
    most_new = min(protocol["max_new_tokens"], window // 2)
    for hole, item in zip(filled, found["items"], strict=True):
        assert hole["id"] == item["id"]
        name, at = hole["id"].rsplit(":", 1)
        content = files[name.split(":", 1)[1]].encode()
        before = content[:int(at)].decode()
        after = content[int(at) + len(hole["truth"].encode()):].decode()
        assert content.decode() == before + hole["truth"] + after
        asked.append((before, hole["truth"], after))
        text, near, tokens = complete(model, tokenizer, before, after, hole["kind"], most_new)
        assert tokens <= window - most_new, "the files of this comparison are short"
        if text != hole["completion"] and not near:
            differing.append({"id": hole["id"], "peer": text, "ours": hole["completion"]})
        is_exact = hole["completion"].strip() == hole["truth"].strip()
        assert item["exact"] == int(is_exact), item
        exact += is_exact
    if args.teach:
        teach(load(args.model, None), tokenizer, asked, args.teach)
    print(json.dumps({"loss": worst, "files": len(found["files"]), "holes": len(filled), "differing": differing, "exact": exact}))


main()
