"""Drives the real llm-ls, the process behind llm-vscode, llm.nvim and llm-intellij, against a running `worker serve`,
through every backend setting, and records what it sends.

    llm_ls.py LLM_LS URL RECORD

LLM_LS is the program (https://github.com/huggingface/llm-ls), URL the server, whose model is called `demo`, and RECORD
the file that the requests go to, which a test replays. Fails where llm-ls gets no completion.
"""

import http.client
import http.server
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from urllib.parse import urlsplit

PROGRAM, URL, RECORD = sys.argv[1:]
TEXT = "def value(x, y):\n    return \n\n\nprint(value(1, 2))\n"
POSITION = {"line": 1, "character": 11}
# What llm-vscode sends where a user has set nothing.
BODY = {"parameters": {"max_new_tokens": 60, "temperature": 0.2, "top_p": 0.95}}
BACKENDS = ["huggingface", "tgi", "openai", "llamacpp", "ollama"]
recorded = []


class Recorder(http.server.BaseHTTPRequestHandler):
    """Passes requests on, and keeps them."""

    backend = ""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server = http.client.HTTPConnection(urlsplit(URL).netloc)
        server.request("POST", self.path, body, {"Content-Type": "application/json"})
        answer = server.getresponse()
        text = answer.read()
        recorded.append({"backend": Recorder.backend, "path": self.path, "body": json.loads(body)})
        self.send_response(answer.status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


class Client:
    def __init__(self, program):
        self.process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.number = 0

    def send(self, message):
        data = json.dumps({"jsonrpc": "2.0", **message}).encode()
        self.process.stdin.write(b"Content-Length: %d\r\n\r\n%s" % (len(data), data))
        self.process.stdin.flush()

    def ask(self, method, params):
        self.number += 1
        self.send({"id": self.number, "method": method, "params": params})
        while True:
            length = 0
            while (line := self.process.stdout.readline().strip()) != b"":
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            message = json.loads(self.process.stdout.read(length))
            if message.get("id") == self.number and "method" not in message:
                return message


def main():
    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Recorder)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{proxy.server_port}"
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "sample.py"
        path.write_text(TEXT)
        document = {"uri": path.as_uri(), "languageId": "python", "version": 1, "text": TEXT}
        client = Client(PROGRAM)
        client.ask("initialize", {"processId": None, "rootUri": None, "capabilities": {}})
        client.send({"method": "initialized", "params": {}})
        client.send({"method": "textDocument/didOpen", "params": {"textDocument": document}})
        for backend in BACKENDS:
            Recorder.backend = backend
            answer = client.ask("llm-ls/getCompletions", {
                "textDocument": {"uri": document["uri"]}, "position": POSITION, "ide": "vscode",
                "fim": {"enabled": True, "prefix": "<fim_prefix>", "middle": "<fim_middle>", "suffix": "<fim_suffix>"},
                "model": "demo", "backend": backend, "url": address, "tokensToClear": ["<|endoftext|>"],
                "contextWindow": 2048, "tlsSkipVerifyInsecure": False, "requestBody": BODY,
                "tokenizerConfig": None, "apiToken": None, "disableUrlPathCompletion": False,
            })
            if "error" in answer:
                sys.exit(f"{backend}: {answer['error']}")
            completions = answer["result"]["completions"]
            assert len(completions) == 1 and isinstance(completions[0]["generated_text"], str), answer
            print(f"{backend}: {recorded[-1]['path']}: {completions[0]['generated_text']!r}")
        client.process.kill()
    Path(RECORD).write_text(json.dumps(recorded, indent=1) + "\n")


main()
