"""Latency and throughput of `worker serve` beside transformers' `generate`, on one model of random weights.

    serve.py [--pairs N] [--layers N] [--width N] [--dtype fp32] [--dtype bf16] ...

Both compute in the same dtype, greedily, without guessing tokens. Prompts are tokens of the virtual environment's own sources.
Markdown goes to stdout, progress to stderr.
"""

import argparse
import http.client
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "target/bench"
WORKER = ROOT / "target/release/worker"
CONTEXT, NEW = 1500, 64
CLIENTS, CLIENT_CONTEXT = 16, 300


def say(text):
    print(text, file=sys.stderr, flush=True)


def make_model(layers, width):
    import torch
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

    directory = BENCH / f"serve-{layers}-{width}"
    if not (directory / "model.safetensors").exists():
        say(f"making a model of {layers} layers, width {width}")
        torch.manual_seed(0)
        config = GPTBigCodeConfig(
            vocab_size=49152, n_positions=2048, n_embd=width, n_layer=layers, n_head=width // 64, n_inner=4 * width,
            bos_token_id=0, eos_token_id=0, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
        )
        GPTBigCodeForCausalLM(config).save_pretrained(directory)
        for file in (BENCH / "tokenizer").iterdir():
            shutil.copy(file, directory / file.name)
    return directory


def prompts(directory, count, tokens, offset):
    """Runs of tokens that have nothing in common."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    found = []
    for path in sorted((ROOT / ".venv").glob("lib/python*/site-packages/transformers/models/*/modeling_*.py"))[offset:]:
        ids = tokenizer.encode(path.read_text(encoding="utf-8")[3000:20000], add_special_tokens=False).ids
        if len(ids) >= tokens:
            found.append(ids[:tokens])
        if len(found) == count:
            return found
    sys.exit("too few sources for prompts")


class Ours:
    def __init__(self, directory, *flags):
        command = [WORKER, "serve", "--model", directory, "--name", "bench", "--listen", "127.0.0.1:0", "--no-speculation"]
        self.process = subprocess.Popen(
            [*command, *flags],
            stderr=subprocess.PIPE, text=True, env={**os.environ, "NO_COLOR": "1"},
        )
        for line in self.process.stderr:
            if "address=" in line:
                host, port = line.split("address=")[1].split()[0].rsplit(":", 1)
                self.address = host, int(port)
                break
        threading.Thread(target=lambda: [None for _ in self.process.stderr], daemon=True).start()

    def complete(self, prompt, new=NEW):
        """Seconds to the first token and to the last one, and the number of tokens."""
        connection = http.client.HTTPConnection(*self.address)
        body = {"prompt": prompt, "max_tokens": new, "temperature": 0, "stream": True, "logprobs": 0}
        began = time.perf_counter()
        connection.request("POST", "/v1/completions", json.dumps(body))
        first, made = None, 0
        for line in connection.getresponse():
            if line.startswith(b"data: {"):
                choice = json.loads(line[6:])["choices"][0]
                if choice["logprobs"]:
                    first = first or time.perf_counter() - began
                    made += len(choice["logprobs"]["tokens"])
        connection.close()
        return first, time.perf_counter() - began, made


class Peer:
    def __init__(self, directory, dtype):
        import torch
        from transformers import AutoModelForCausalLM

        self.torch = torch
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()

    def complete(self, prompts, new=NEW):
        """Seconds and number of tokens, of prompts of one length in one batch."""
        ids = self.torch.tensor(prompts)
        began = time.perf_counter()
        with self.torch.no_grad():
            made = self.model.generate(
                ids, attention_mask=self.torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0
            )
        return time.perf_counter() - began, made[:, ids.shape[1]:].numel()


def single_stream(ours, peer, prompts):
    """Of each prompt: our seconds a token beside the peer's, both times, a second keystroke's first token beside the
    first one's, and tokens a second after the first."""
    rows = []
    for prompt in prompts:
        first, took, made = ours.complete(prompt)
        again, _, _ = ours.complete(prompt + [5], new=1)
        theirs, theirs_made = peer.complete([prompt])
        say(f"single: ours {took:.2f} s for {made}, first after {first:.2f} s, again {again:.3f} s; peer {theirs:.2f} s for {theirs_made}")
        rows.append(((took / made) / (theirs / theirs_made), took, theirs, again / first, (made - 1) / (took - first)))
    return list(zip(*rows[1:]))  # the first warms up


def many_clients(ours, peer, batches):
    """Tokens a second of all clients: ours, the peer's one after the other, the peer's in one batch."""
    rows = []
    for batch in batches:
        total = [0] * CLIENTS

        def client(number):
            total[number] = ours.complete(batch[number])[2]

        threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        rate = sum(total) / (time.perf_counter() - began)
        began = time.perf_counter()
        made = sum(peer.complete([prompt])[1] for prompt in batch)
        alone = made / (time.perf_counter() - began)
        took, made = peer.complete(batch)
        say(f"{CLIENTS} clients: ours {rate:.0f} tokens/s, peer {alone:.0f}, in one batch {made / took:.0f}")
        rows.append((rate, alone, made / took))
    return list(zip(*rows))


def median(values):
    return statistics.median(values)


def span(values):
    return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def compare(directory, dtype, pairs):
    ours, peer = Ours(directory, "--dtype", dtype), Peer(directory, dtype)
    try:
        ratios, took, theirs, again, rest = single_stream(ours, peer, prompts(directory, pairs + 1, CONTEXT, 0))
        rates, alone, batched = many_clients(
            ours, peer, [prompts(directory, CLIENTS, CLIENT_CONTEXT, 40 + 20 * pair) for pair in range(pairs)]
        )
    finally:
        ours.process.kill()
    print(f"| {dtype}: {NEW} tokens after {CONTEXT}, seconds | {median(took):.2f} | {median(theirs):.2f} | {span(ratios)} |")
    clients = f"{dtype}: {CLIENTS} clients at once, {NEW} tokens after {CLIENT_CONTEXT}, tokens/s"
    print(f"| {clients}; the peer's one after the other | {median(rates):.0f} | {median(alone):.0f} "
          f"| {span([a / b for a, b in zip(rates, alone)])} |")
    print(f"| {clients}; the peer's in one batch of equal lengths | {median(rates):.0f} | {median(batched):.0f} "
          f"| {span([a / b for a, b in zip(rates, batched)])} |")
    print(f"| {dtype}: first token after one more token of the prompt, beside the first time | | | {span(again)} |")
    size = (directory / "model.safetensors").stat().st_size / (1 if dtype == "fp32" else 2)
    return f"{dtype} {median(rest):.0f} tokens/s, {median(rest) * size / 1e9:.1f} GB/s of weights"


def quantised(directory, kind, pairs):
    ours = Ours(directory, "--quantize", kind)
    try:
        rows = [ours.complete(prompt) for prompt in prompts(directory, pairs + 1, CONTEXT, 0)][1:]
    finally:
        ours.process.kill()
    return f"{kind} {median((made - 1) / (took - first) for first, took, made in rows):.0f} tokens/s"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--dtype", action="append", choices=("fp32", "bf16"))
    args = parser.parse_args()
    directory = make_model(args.layers, args.width)
    print(f"\n| {args.layers} layers, width {args.width} | ours | transformers | ratio (of single pairs) |")
    print("| --- | --- | --- | --- |", flush=True)
    alone = [compare(directory, dtype, args.pairs) for dtype in args.dtype or ("fp32", "bf16")]
    alone += [quantised(directory, kind, args.pairs) for kind in ("int8", "nf4")]
    print(f"\nAlone, after the first token: {'; '.join(alone)}.")


main()
