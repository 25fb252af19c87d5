"""Conversations as templates lay them out: text, tokens and which of them are learnt.

    make_chat_fixtures.py DIR

DIR/<tokenizer>-<template> holds `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja` and `cases.jsonl`: in each
line {messages, text, spans, prompt} as transformers renders them (spans in bytes of UTF-8; prompt up to where the last
answer begins), and {ids, mask} where they are known:

- of a conversation that spells out no control token, transformers' own `apply_chat_template(return_assistant_tokens_mask)`;
- of any conversation under a template that this program has by name, a reference written out by hand below, in which what
  people say is encoded as text. Where both are there, they are equal.

DIR/packed holds a small StarCoder, conversations, and the loss and gradients that transformers has of them one by one.
"""

import argparse
import json
import random
from pathlib import Path

from fixture_dir import once
from make_tokenizers import byte_level, codellama, qwen, save

ROOT = Path(__file__).parents[2]
TEMPLATES = ROOT / "proto/src/chat"
CONVERSATIONS = 1000
EOS = "<|endoftext|>"
STARCODER = [EOS, "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "<filename>", "<reponame>"]
SPECIAL = {
    "prompter": [],
    "octocoder": [],
    "starchat": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "chatml": ["<|im_start|>", "<|im_end|>"],
}

# In the manner of templates on the hub: whitespace control, namespaces, macros, slices, methods of texts, errors.
HEADERS = """\
{%- if messages[0]['role'] == 'system' -%}
    {%- set system_message = messages[0]['content'] | trim -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set system_message = '' -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{{ eos_token }}{% if system_message != '' %}<|im_start|>system

{{ system_message }}<|im_end|>{% endif %}
{% for message in loop_messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('roles must alternate') }}
    {% endif %}
    {% if message['role'] == 'user' %}
<|im_start|>user

{{ message['content'] | trim }}<|im_end|>
    {%- else %}
<|im_start|>assistant

{% generation %}{{ message['content'] | trim }}<|im_end|>{% endgeneration %}
    {%- endif %}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant

{% endif %}
"""
MACROS = """\
{%- macro head(role) -%}
<|im_start|>{{ role }}{{ '\\n' }}
{%- endmacro -%}
{%- set ns = namespace(system=false, count=0) -%}
{%- for message in messages -%}
{%- if message.role == 'system' and not ns.system -%}
{%- set ns.system = true -%}
{{ head('system') ~ message.content.strip() ~ '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- for message in messages | rejectattr('role', 'equalto', 'system') -%}
{%- set ns.count = ns.count + 1 -%}
{{ head(message.role | upper | lower) }}
{%- if message.role == 'assistant' -%}
{%- generation -%}{{ message.content }}{%- if not loop.last -%}<|im_end|>{%- else -%}<|im_end|>{{ eos_token }}{%- endif -%}
{%- endgeneration -%}{{ '\\n' }}
{%- else -%}
{{ message.content + '<|im_end|>\\n' if message.content is string else raise_exception('no text') }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ head('assistant') }}{%- endif -%}
{%- if tools is defined and tools -%}{{ tools | tojson }}{%- endif -%}
"""
HUB = {"headers": HEADERS, "macros": MACROS}

WORDS = ["def f(x):", "return", "Hello", "world", "gr\u00f6\u00dfe", "\u6ce8\u91ca", "\U0001f999", "e\u0301", "\n", "\n\n", "\t", " ", "  ",
         "{{ messages }}", "{% endfor %}", "{# no #}", "### Human:", "### Assistant:", "Question:", "Answer:", "0", "42", "'", '"', "\\n",
         "\ue000", "\ue001\ue002", "\U000f0000", "<", ">", "|", "<|", "|>", "im_start", "<s>", "</s>", "\u2581"]
HOSTILE = [EOS, "<|im_start|>", "<|im_end|>", "<|im_start|>system\n", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>",
           "<|prompter|>", "<fim_prefix>", "<|im_end|>\n<|im_start|>assistant\n", "<|<|im_end|>|>", "<|im_start<|im_start|>"]


def text(draw, hostile):
    pieces = [draw.choice(HOSTILE if hostile and draw.random() < 0.3 else WORDS) for _ in range(draw.randint(1, 12))]
    # A turn says something.
    pieces.insert(draw.randint(0, len(pieces)), draw.choice("abcxyz"))
    return draw.choice(["", " "]).join(pieces)


def conversations():
    draw = random.Random(7)
    for number in range(CONVERSATIONS):
        hostile = number % 2 == 1
        messages = [dict(role="system", content=text(draw, hostile))] if draw.random() < 0.4 else []
        for _ in range(draw.randint(1, 3)):
            messages.append(dict(role="user", content=text(draw, hostile)))
            messages.append(dict(role="assistant", content=text(draw, hostile)))
        yield messages


def by_hand(template, messages):
    """Pieces (text, is a control token, is learnt) of a conversation, as the system that each template is from wrote it."""
    out = []
    say = lambda text, learnt=False: out.append((text, False, learnt))
    mark = lambda text, learnt=False: out.append((text, True, learnt))
    if template == "prompter":
        marks = dict(system="<|system|>", user="<|prompter|>", assistant="<|assistant|>")
        for number, message in enumerate(messages):
            learnt = message["role"] == "assistant"
            say((" " if number else "") + marks[message["role"]] + " ")
            say(message["content"] + " ", learnt)
            mark(EOS, learnt)
    elif template == "octocoder":
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                say("Answer: ")
                say(message["content"], True)
                mark(EOS, True)
                if number + 1 < len(messages):
                    say("\n\n")
            else:
                say(("Question: " if message["role"] == "user" else "") + message["content"] + "\n\n")
    elif template == "starchat":
        if messages[0]["role"] != "system":
            mark("<|system|>"), say("\n"), mark("<|end|>"), say("\n")
        for message in messages:
            learnt = message["role"] == "assistant"
            mark(f"<|{message['role']}|>")
            say("\n" + message["content"], learnt)
            mark("<|end|>", learnt)
            say("\n")
    else:
        for message in messages:
            learnt = message["role"] == "assistant"
            mark("<|im_start|>"), say(message["role"] + "\n"), say(message["content"], learnt)
            mark("<|im_end|>", learnt), say("\n")
    return out


def encoded(tokenizer, pieces):
    """Tokens of `by_hand`'s pieces and a mask: texts between control tokens are encoded as one, control tokens in them as text."""
    ids, mask, run = [], [], []

    def flush():
        whole = "".join(text for text, _ in run)
        learnt = [flag for text, flag in run for _ in text]
        run.clear()
        if not whole:
            return
        encoding = tokenizer.encode(whole, add_special_tokens=False)
        end = 0
        for token, (first, last) in zip(encoding.ids, encoding.offsets):
            first = min(first, end)
            end = max(end, last)
            ids.append(token)
            mask.append(int(any(learnt[first:last])))

    tokenizer.encode_special_tokens = True
    for text, is_control, flag in pieces:
        if is_control:
            flush()
            ids.append(tokenizer.token_to_id(text))
            mask.append(int(flag))
        else:
            run.append((text, flag))
    flush()
    tokenizer.encode_special_tokens = False
    return ids, mask


def in_bytes(text, spans):
    at = lambda place: len(text[:place].encode())
    return [[at(first), at(last)] for first, last in spans]


def cases(directory, template, is_exact):
    """`is_exact`: whether transformers' tokens of harmless conversations are the rule, and not only the hand-written ones."""
    from transformers import PreTrainedTokenizerFast
    from transformers.utils.chat_template_utils import render_jinja_template

    jinja = (directory / "chat_template.jinja").read_text()
    config = json.loads((directory / "tokenizer_config.json").read_text())
    eos = config["eos_token"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"), eos_token=eos)
    tokenizer.chat_template = jinja
    controls = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    rows, harmless = [], 0
    for messages in conversations():
        [whole], [spans] = render_jinja_template(
            [messages], chat_template=jinja, return_assistant_tokens_mask=True, **tokenizer.special_tokens_map
        )
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        row = dict(messages=messages, text=whole, spans=in_bytes(whole, spans), prompt=prompt)
        is_harmless = not any(control in message["content"] for message in messages for control in controls)
        if template in SPECIAL and eos == EOS:
            row["ids"], row["mask"] = encoded(tokenizer.backend_tokenizer, by_hand(template, messages))
        if is_harmless:
            harmless += 1
            found = tokenizer.apply_chat_template(
                messages, return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs={}
            )
            ids, mask = list(found["input_ids"]), list(found["assistant_masks"])
            if "ids" in row:
                assert (row["ids"], row["mask"]) == (ids, mask), (template, messages)
            row["ids"], row["mask"] = ids, mask
            row["prompt_ids"] = list(
                tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
            )
        rows.append(json.dumps(row))
    assert harmless >= CONVERSATIONS // 5, harmless
    (directory / "cases.jsonl").write_text("\n".join(rows) + "\n")


def starcoder(out):
    save(byte_level([], STARCODER), out / "starcoder", eos_token=EOS, tokenizer_class="GPT2TokenizerFast")


def make_cases(out):
    made = []
    base = out / "tokenizers"
    for family in (starcoder, qwen, codellama):
        family(base)
    plans = [("starcoder", template) for template in (*SPECIAL, *HUB)]
    plans += [("qwen", "chatml"), ("qwen", "headers"), ("qwen", "macros"), ("codellama", "prompter"), ("codellama", "octocoder")]
    for tokenizer, template in plans:
        from tokenizers import AddedToken, Tokenizer

        directory = out / f"{tokenizer}-{template}"
        loaded = Tokenizer.from_file(str(base / tokenizer / "tokenizer.json"))
        added = SPECIAL.get(template, SPECIAL["chatml"])
        loaded.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in added])
        save(loaded, directory, **json.loads((base / tokenizer / "tokenizer_config.json").read_text()))
        jinja = HUB[template] if template in HUB else (TEMPLATES / f"{template}.jinja").read_text()
        (directory / "chat_template.jinja").write_text(jinja)
        cases(directory, template, True)
        made.append(dict(directory=directory.name, tokenizer=tokenizer, template=template, special_tokens=added))
    return made


def make_packed(out):
    """Loss and gradients of conversations one by one, of the tokens that are learnt."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from make_fixtures import randomise
    from make_fixtures import starcoder as shape

    source, directory, most = out / "starcoder-chatml", out / "packed", 320
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(source / "tokenizer.json"), eos_token=EOS)
    tokenizer.chat_template = (source / "chat_template.jinja").read_text()
    rows = [json.loads(line) for line in (source / "cases.jsonl").read_text().splitlines()]
    # Some are longer than a sequence: they are cut at their ends, where there is something left to learn.
    short = [row for row in rows if len(row["ids"]) <= most][:40]
    long = [row for row in rows if len(row["ids"]) > most and any(row["mask"][:most])][:4]
    chosen = short + long
    case = dict(vocab_size=len(tokenizer), n_positions=most, n_embd=32, n_head=2, n_layer=2, n_inner=None,
                activation_function="gelu_pytorch_tanh")
    model = AutoModelForCausalLM.from_config(shape(case)).train()
    randomise(model, torch.Generator().manual_seed(11))
    directory.mkdir()
    model.save_pretrained(directory / "model", safe_serialization=True)
    model = AutoModelForCausalLM.from_pretrained(directory / "model", attn_implementation="eager").train()
    loss_sum, count = torch.zeros(()), 0
    for row in chosen:
        ids, mask = row["ids"][:most], row["mask"][:most]
        labels = [token if learnt else -100 for token, learnt in zip(ids, mask)]
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
        loss_sum = loss_sum + torch.nn.functional.cross_entropy(
            logits, torch.tensor(labels[1:]), ignore_index=-100, reduction="sum"
        )
        count += sum(label != -100 for label in labels[1:])
    loss = loss_sum / count
    loss.backward()
    tensors = {"loss": loss.detach().reshape(1), "count": torch.tensor([count])}
    tensors |= {f"grad.{name}": parameter.grad.clone() for name, parameter in model.named_parameters()}
    save_file(tensors, directory / "fixture.safetensors")
    (directory / "conversations.json").write_text(json.dumps([row["messages"] for row in chosen]))
    return dict(directory=directory.name, tokenizer=source.name, sequence_tokens=most)


def make(out):
    import transformers

    transformers.logging.set_verbosity_error()
    return {"cases": make_cases(out), "packed": make_packed(out)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory of the fixtures")
    out = parser.parse_args().out
    beside = ("make_chat_fixtures.py", "make_tokenizers.py", "make_fixtures.py")
    sources = [Path(__file__).with_name(name) for name in beside] + sorted(TEMPLATES.glob("*.jinja"))
    once(out, sources, lambda: make(out))


if __name__ == "__main__":
    main()
