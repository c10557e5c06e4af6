"""A small Hub over HTTP, with the endpoints that huggingface_hub and kernels call: repositories, large files, commits.

    server = HubServer(); server.start(); ...; server.url; server.fail["commit"] = [500, 500]; server.stop()

`fail` maps a step (create, branch, preupload, lfs, put, part, complete, verify, commit, resolve) to the answers that it
gives before it works again: a status, "drop" to close the connection unanswered, "cut" to close it before all has been
sent, or None to work this once. Large files beyond `part_bytes`, where given, are asked for in parts of so many bytes.
"""

import base64
import hashlib
import json
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "test-token"
LARGE = (".safetensors", ".bin")
KINDS = {"models": "model", "datasets": "dataset", "kernels": "kernel"}


def etag(data):
    return f'"{hashlib.md5(data).hexdigest()}"'


class Repo:
    def __init__(self, name, private):
        self.name, self.private, self.branches, self.commits = name, private, {"main": None}, {None: {}}

    def files(self, revision):
        """path -> content at a branch or commit, None if there is no such revision."""
        return self.commits.get(self.commit_of(revision))

    def commit_of(self, revision):
        return self.branches.get(revision.removeprefix("refs/heads/"), revision)

    def commit(self, branch, files):
        oid = hashlib.sha1(uuid.uuid4().bytes).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid


class HubServer:
    def __init__(self, *, token=TOKEN, writable=True, part_bytes=None):
        self.token, self.writable, self.part_bytes = token, writable, part_bytes
        self.repos, self.blobs, self.parts, self.requests = {}, {}, {}, []
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
        if answer is None:
            return False
        if answer == "drop":
            self.close_connection = True
            self.connection.close()
        else:
            self.reply(answer, {"error": f"told to answer {answer}"})
        return True

    def cuts(self, step):
        """Whether this request was told to break off after a few of its bytes, and has."""
        if (self.server_hub.fail.get(step) or [None])[0] != "cut":
            return False
        self.server_hub.fail[step].pop(0)
        self.server_hub.requests.append(step)
        self.rfile.read(min(100, int(self.headers.get("Content-Length") or 100)))
        self.close_connection = True
        self.connection.close()
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
                known = one["oid"] in hub.blobs
                objects.append({**one, "authenticated": True, **({} if known else {"actions": self.actions(one)})})
            return self.reply(200, {"transfer": "basic", "objects": objects})
        if parts[0] == "complete":
            return None if self.fails("complete") else self.complete(json.loads(body))
        if parts[0] == "verify":
            return None if self.fails("verify") or not self.may_write() else self.verify(json.loads(body))
        if parts[0] == "api" and parts[1] in KINDS and len(parts) >= 6:
            step, revision = parts[4], "/".join(parts[5:])
            if step not in ("preupload", "commit", "branch"):
                return self.reply(404, {"error": path})
            if self.fails(step) or not self.may_write():
                return None
            repo = self.repo(KINDS[parts[1]], f"{parts[2]}/{parts[3]}")
            return None if repo is None else getattr(self, step)(repo, revision, body)
        return self.reply(404, {"error": path})

    def actions(self, one):
        """Where a large file is to be put: at once, or in parts whose addresses are headers called 1, 2, ..."""
        hub, oid = self.server_hub, one["oid"]
        verify = {"href": f"{hub.url}/verify/{oid}", "header": {}}
        if hub.part_bytes is None or one["size"] <= hub.part_bytes:
            return {"upload": {"href": f"{hub.url}/blobs/{oid}", "header": {}}, "verify": verify}
        number = -(-one["size"] // hub.part_bytes)
        header = {str(i): f"{hub.url}/parts/{oid}/{i}" for i in range(1, number + 1)}
        header["chunk_size"] = str(hub.part_bytes)
        return {"upload": {"href": f"{hub.url}/complete/{oid}", "header": header}, "verify": verify}

    def complete(self, wanted):
        """Put the parts together, in the order of their numbers."""
        hub = self.server_hub
        kept = [hub.parts.get((wanted["oid"], part["partNumber"])) for part in wanted["parts"]]
        if any(data is None or etag(data) != p["etag"] for data, p in zip(kept, wanted["parts"], strict=True)):
            return self.reply(400, {"error": "a part is not what was sent"})
        return self.keep(wanted["oid"], b"".join(kept))

    def verify(self, wanted):
        blob = self.server_hub.blobs.get(wanted["oid"])
        whole = blob is not None and len(blob) == wanted["size"]
        return self.reply(200 if whole else 404, {} if whole else {"error": "the file is not whole"})

    def keep(self, oid, data):
        if hashlib.sha256(data).hexdigest() != oid:
            return self.reply(400, {"error": "the content is not what its name says"})
        self.server_hub.blobs[oid] = data
        return self.reply(200, {})

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
        parts = self.path.strip("/").split("/")
        step = {"blobs": "put", "parts": "part"}[parts[0]]
        if self.cuts(step):
            return None
        data = self.body()
        if self.fails(step):
            return None
        if step == "put":
            return self.keep(parts[1], data)
        self.server_hub.parts[parts[1], int(parts[2])] = data
        return self.reply(200, headers={"ETag": etag(data)})

    def do_GET(self):
        path = urlsplit(self.path).path
        parts = [unquote(part) for part in path.strip("/").split("/")]
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
            commit = repo.commit_of(parts[3])
            headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(files[name]).hexdigest()}"',
                       "Content-Type": "application/octet-stream"}  # fmt: skip
            return self.reply(200, files[name], headers=headers)
        return self.reply(404, {"error": path})

    do_HEAD = do_GET

    def tree(self, files, folder):
        """The files in `folder`, and the folders in it unless those are to be looked into as well."""
        inside = f"{folder}/" if folder else ""
        found = {name: data for name, data in files.items() if name.startswith(inside)}
        entries = [{"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                   for name, data in found.items()]  # fmt: skip
        if parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() in ("true", "1"):
            return entries
        names = sorted({name.removeprefix(inside).split("/")[0] for name in found if "/" in name.removeprefix(inside)})
        folders = [{"type": "directory", "path": inside + name, "oid": "0" * 40} for name in names]
        return folders + [entry for entry in entries if "/" not in entry["path"].removeprefix(inside)]

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
        commit = repo.commit_of(revision)
        if rest[:1] == ["tree"]:
            return self.reply(200, self.tree(files, "/".join(rest[2:])))
        name, siblings = f"{parts[2]}/{parts[3]}", [{"rfilename": n} for n in files]
        about = {"id": name, "modelId": name, "sha": commit, "private": repo.private, "tags": [], "downloads": 0}
        return self.reply(200, {**about, "siblings": siblings, "likes": 0})
