"""The clients that people use, against a running `worker serve`: fails where one of them does not understand it.

    clients.py URL

The server's model is called `demo`.
"""

import sys

from huggingface_hub import InferenceClient
from openai import BadRequestError, NotFoundError, OpenAI

URL = sys.argv[1]
PROMPT, SUFFIX = "def value(x, y):\n    return", "\n\nvalue(1, 2)\n"


def openai():
    client = OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["demo"]
    whole = client.completions.create(model="demo", prompt=PROMPT, max_tokens=12, temperature=0, logprobs=2)
    choice = whole.choices[0]
    assert choice.finish_reason in ("length", "stop") and len(choice.logprobs.tokens) == whole.usage.completion_tokens
    parts = client.completions.create(model="demo", prompt=PROMPT, max_tokens=12, temperature=0, stream=True)
    assert "".join(part.choices[0].text for part in parts) == choice.text
    filled = client.completions.create(model="demo", prompt=PROMPT, suffix=SUFFIX, max_tokens=12, temperature=0)
    assert "\n" not in filled.choices[0].text.strip("\n"), "a hole in a line is filled with a line"
    several = client.completions.create(model="demo", prompt=PROMPT, max_tokens=4, n=3, seed=1, temperature=1.0)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    again = client.completions.create(model="demo", prompt=PROMPT, max_tokens=4, n=3, seed=1, temperature=1.0)
    assert [c.text for c in several.choices] == [c.text for c in again.choices], "a seed repeats what was drawn"
    echoed = client.completions.create(model="demo", prompt=PROMPT, max_tokens=2, echo=True)
    assert echoed.choices[0].text.startswith(PROMPT)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 1?"}]
    chat = client.chat.completions.create(model="demo", messages=messages, max_tokens=8, temperature=0)
    assert chat.choices[0].message.role == "assistant"
    parts = client.chat.completions.create(model="demo", messages=messages, max_tokens=8, temperature=0, stream=True)
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text.lstrip() == chat.choices[0].message.content
    for wrong, error in [({"model": "nobody"}, NotFoundError), ({"temperature": -1}, BadRequestError)]:
        try:
            client.completions.create(**{"model": "demo", "prompt": PROMPT, "max_tokens": 4, **wrong})
        except error as refusal:
            assert refusal.body["message"], refusal.body
        else:
            raise AssertionError(f"{wrong} is refused")


def hugging_face():
    client = InferenceClient(base_url=URL)
    text = client.text_generation(PROMPT, max_new_tokens=12)
    details = client.text_generation(PROMPT, max_new_tokens=12, details=True)
    assert details.generated_text == text and details.details.generated_tokens >= 1
    assert "".join(client.text_generation(PROMPT, max_new_tokens=12, stream=True)) == text
    events = list(client.text_generation(PROMPT, max_new_tokens=12, stream=True, details=True))
    assert events[-1].generated_text == text


openai()
hugging_face()
print("understood")
