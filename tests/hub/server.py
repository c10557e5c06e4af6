"""A small Hub over HTTP, with the endpoints that huggingface_hub and kernels call: repositories, large files, commits.

    server = HubServer(); server.start(); ...; server.url; server.fail["commit"] = [500, 500]; server.stop()

`fail` maps a step (create, preupload, lfs, put, commit, resolve) to the answers it gives before it works again: a
status, or "drop" to close the connection in the middle.
"""

import base64
import hashlib
import json
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "test-token"
LARGE = (".safetensors", ".bin")
KINDS = {"models": "model", "datasets": "dataset", "kernels": "kernel"}


class Repo:
    def __init__(self, name, private):
        self.name, self.private, self.branches, self.commits = name, private, {"main": None}, {None: {}}

    def files(self, revision):
        """path -> content at a branch or commit, None if there is no such revision."""
        commit = self.branches.get(revision, revision)
        return self.commits.get(commit)

    def commit(self, branch, files):
        oid = hashlib.sha1(uuid.uuid4().bytes).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid


class HubServer:
    def __init__(self, *, token=TOKEN, writable=True):
        self.token, self.writable = token, writable
        self.repos, self.blobs, self.requests = {}, {}, []
        self.fail = {}
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def start(self):
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def stop(self):
        self.http.shutdown()
        self.http.server_close()

    def count(self, step):
        return sum(name == step for name in self.requests)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub = None

    def log_message(self, *args):
        pass

    # Answers

    def reply(self, status, body=None, *, code=None, headers=None):
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}
        if code:
            headers["X-Error-Code"] = code
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def fails(self, step):
        """Whether this request was told to fail, and has answered so."""
        self.server_hub.requests.append(step)
        answers = self.server_hub.fail.get(step) or []
        if not answers:
            return False
        answer = answers.pop(0)
        if answer == "drop":
            self.close_connection = True
            self.connection.close()
        else:
            self.reply(answer, {"error": f"told to answer {answer}"})
        return True

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            pieces = []
            while size := int(self.rfile.readline().strip(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def may_write(self):
        hub = self.server_hub
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            self.reply(401, {"error": "Invalid credentials"})
            return False
        if not hub.writable:
            self.reply(403, {"error": "You don't have the rights"})
            return False
        return True

    def repo(self, kind, name):
        """The repository, or None after saying that there is none for who asks."""
        repo = self.server_hub.repos.get((kind, name))
        known = self.headers.get("Authorization") == f"Bearer {self.server_hub.token}"
        if repo is None or (repo.private and not known):
            self.reply(401 if not known else 404, {"error": "Repository not found"}, code="RepoNotFound")
            return None
        return repo

    # Requests

    def do_POST(self):
        hub, path, body = self.server_hub, unquote(urlsplit(self.path).path), self.body()
        parts = path.strip("/").split("/")
        if path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            if self.fails("create") or not self.may_write():
                return None
            wanted = json.loads(body)
            name = (
                f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else f"me/{wanted['name']}"
            )
            key = (wanted.get("type") or "model", name)
            answer = {"url": f"{hub.url}/{name}", "id": name, "name": name}
            if key in hub.repos:
                return self.reply(409, {"error": "You already created this repo", **answer})
            hub.repos[key] = Repo(name, wanted.get("private") or wanted.get("visibility") == "private")
            return self.reply(200, answer)
        if path.endswith("/info/lfs/objects/batch"):
            if self.fails("lfs") or not self.may_write():
                return None
            objects = []
            for one in json.loads(body)["objects"]:
                upload = {"href": f"{hub.url}/blobs/{one['oid']}", "header": {}}
                known = one["oid"] in hub.blobs
                objects.append({**one, "authenticated": True, **({} if known else {"actions": {"upload": upload}})})
            return self.reply(200, {"transfer": "basic", "objects": objects})
        if parts[0] == "api" and parts[1] in KINDS and len(parts) >= 6:
            step, revision = parts[4], "/".join(parts[5:])
            if step not in ("preupload", "commit", "branch"):
                return self.reply(404, {"error": path})
            if self.fails(step) or not self.may_write():
                return None
            repo = self.repo(KINDS[parts[1]], f"{parts[2]}/{parts[3]}")
            return None if repo is None else getattr(self, step)(repo, revision, body)
        return self.reply(404, {"error": path})

    def preupload(self, repo, revision, body):
        files = [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular",
                  "shouldIgnore": False} for f in json.loads(body)["files"]]  # fmt: skip
        self.reply(200, {"files": files})

    def branch(self, repo, revision, body):
        if revision in repo.branches:
            return self.reply(409, {"error": "Reference already exists"})
        repo.branches[revision] = repo.branches["main"]
        return self.reply(200, {})

    def commit(self, repo, revision, body):
        hub, files = self.server_hub, dict(repo.files(revision) or {})
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in hub.blobs:
                    return self.reply(400, {"error": f"{value['path']} was not uploaded"})
                files[value["path"]] = hub.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
            elif entry["key"] == "deletedFolder":
                files = {name: data for name, data in files.items() if not name.startswith(value["path"])}
        oid = repo.commit(revision, files)
        return self.reply(200, {"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{repo.name}/commit/{oid}"})

    def do_PUT(self):
        oid, data = self.path.rpartition("/")[2], self.body()
        if self.fails("put"):
            return None
        if hashlib.sha256(data).hexdigest() != oid:
            return self.reply(400, {"error": "the content is not what its name says"})
        self.server_hub.blobs[oid] = data
        return self.reply(200)

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        parts = path.strip("/").split("/")
        if path == "/api/whoami-v2":
            return self.reply(200, {"name": "me", "type": "user", "orgs": []})
        if parts[0] == "api" and len(parts) >= 4 and parts[1] in KINDS:
            return self.describe(parts)
        kind = KINDS[parts.pop(0)] if parts[0] in KINDS else "model"
        if len(parts) >= 5 and parts[2] == "resolve":
            if self.fails("resolve"):
                return None
            repo = self.repo(kind, f"{parts[0]}/{parts[1]}")
            if repo is None:
                return None
            files = repo.files(parts[3])
            if files is None:
                return self.reply(404, {"error": "no such revision"}, code="RevisionNotFound")
            name = "/".join(parts[4:])
            if name not in files:
                return self.reply(404, {"error": "no such file"}, code="EntryNotFound")
            commit = repo.branches.get(parts[3], parts[3])
            headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(files[name]).hexdigest()}"',
                       "Content-Type": "application/octet-stream"}  # fmt: skip
            return self.reply(200, files[name], headers=headers)
        return self.reply(404, {"error": path})

    do_HEAD = do_GET

    def describe(self, parts):
        repo = self.repo(KINDS[parts[1]], f"{parts[2]}/{parts[3]}")
        if repo is None:
            return None
        rest = parts[4:]
        revision = rest[1] if len(rest) > 1 else "main"
        if rest[:1] == ["refs"]:
            branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repo.branches.items()]
            return self.reply(200, {"branches": branches, "tags": [], "converts": []})
        files = repo.files(revision)
        if files is None:
            return self.reply(404, {"error": "no such revision"}, code="RevisionNotFound")
        commit = repo.branches.get(revision, revision)
        if rest[:1] == ["tree"]:
            tree = [{"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                    for n, d in files.items()]  # fmt: skip
            return self.reply(200, tree)
        name, siblings = f"{parts[2]}/{parts[3]}", [{"rfilename": n} for n in files]
        about = {"id": name, "modelId": name, "sha": commit, "private": repo.private, "tags": [], "downloads": 0}
        return self.reply(200, {**about, "siblings": siblings, "likes": 0})
