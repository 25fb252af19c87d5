"""Serves the repositories below a directory over HTTP, by git's own `http-backend`, and lists them as a forge does.

    git_http_server.py ROOT [USER:PASSWORD]

Prints the port it listens on, and serves until stdin closes. With USER:PASSWORD it asks for them; its API takes the
password as a bearer token.

`/api/v3/orgs/ORG/repos` answers in the shapes of GitHub's REST API, `/api/v1/...` in those of Gitea's, from
ROOT/ORG/forge.json: {"repositories": [...], "page": MOST_ON_A_PAGE, "faults": [...]}; each fault is the answer to one
request: a status, or "limit" (a limit of requests, over in a second), "cut" (no answer).
"""

import base64
import json
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

ROOT = os.path.abspath(sys.argv[1])
CREDENTIALS = sys.argv[2] if len(sys.argv) > 2 else None


PORT = None
FAULTS = {}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def say(self, status, body, headers=()):
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in (("Content-Length", str(len(content))), ("Content-Type", "application/json"), *headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def list_repositories(self, url):
        """An API's answer to a request for an owner's repositories."""
        _, _, version, kind, owner, _ = url.path.split("/")
        if CREDENTIALS and self.headers.get("Authorization") != "Bearer " + CREDENTIALS.split(":")[1]:
            return self.say(401, {"message": "Bad credentials"})
        forge = os.path.join(ROOT, owner, "forge.json")
        if not os.path.exists(forge):
            return self.say(404, {"message": "Not Found"})
        with open(forge) as file:
            forge = json.load(file)
        if forge.get("kind", "orgs") != kind:
            return self.say(404, {"message": "Not Found"})
        faults = FAULTS.setdefault(owner, list(forge.get("faults", [])))
        if faults:
            fault = faults.pop(0)
            if fault == "cut":
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return None
            if fault == "limit":
                reset = str(int(time.time()) + 1)
                headers = (("X-RateLimit-Remaining", "0"), ("X-RateLimit-Reset", reset))
                return self.say(403, {"message": "API rate limit exceeded"}, headers)
            return self.say(fault, {"message": "in trouble"})
        query = parse_qs(url.query)
        asked = query["per_page" if version == "v3" else "limit"][0]
        size, page = min(int(asked), forge.get("page", 100)), int(query["page"][0])
        shown = []
        for repository in forge["repositories"][(page - 1) * size : page * size]:
            full = {
                "name": repository["name"],
                "full_name": f"{owner}/{repository['name']}",
                "clone_url": f"http://127.0.0.1:{PORT}/{owner}/{repository['name']}/.git",
                "ssh_url": f"git@127.0.0.1:{owner}/{repository['name']}.git",
                "owner": {"login": owner},
                "private": False,
                "fork": False,
                "archived": False,
                "license": None,
                "updated_at": "2026-01-01T00:00:00Z",
                "stargazers_count" if version == "v3" else "stars_count": 0,
            } | repository
            full.pop("stars_count" if version == "v3" else "stargazers_count", None)
            if version == "v3":
                full |= {"disabled": False, "pushed_at": full["updated_at"]}
            shown.append(full)
        links = []
        if page * size < len(forge["repositories"]):
            here = f"http://127.0.0.1:{PORT}{url.path}?page={page + 1}"
            links = [("Link", f'<{here}>; rel="next", <{here}>; rel="last"')]
        return self.say(200, shown, links)

    def answer(self):
        if self.path.startswith("/api/"):
            return self.list_repositories(urlsplit(self.path))
        if self.path.startswith("/silent/"):
            # Never in the time of a test.
            time.sleep(600)
        if CREDENTIALS:
            wanted = "Basic " + base64.b64encode(CREDENTIALS.encode()).decode()
            if self.headers.get("Authorization") != wanted:
                self.send_response(401)
                self.send_header("WWW-Authenticate", 'Basic realm="test"')
                self.send_header("Content-Length", "0")
                self.end_headers()
                return None
        url = urlsplit(self.path)
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        environment = os.environ | {
            "GIT_PROJECT_ROOT": ROOT,
            "GIT_HTTP_EXPORT_ALL": "1",
            "PATH_INFO": url.path,
            "QUERY_STRING": url.query,
            "REQUEST_METHOD": self.command,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(body)),
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
            "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
        }
        out = subprocess.run(["git", "http-backend"], input=body, env=environment, capture_output=True).stdout
        head, _, content = out.partition(b"\r\n\r\n")
        fields = [line.split(": ", 1) for line in head.decode().split("\r\n")]
        status = next((value for name, value in fields if name == "Status"), "200 OK")
        self.send_response(int(status.split()[0]))
        for name, value in fields:
            if name != "Status":
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        return None

    do_GET = do_POST = answer

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
PORT = server.server_address[1]
threading.Thread(target=server.serve_forever, daemon=True).start()
print(PORT, flush=True)
sys.stdin.read()
