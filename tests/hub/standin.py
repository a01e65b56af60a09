"""A stand-in for the Hugging Face Hub on loopback: what its client needs to push and pull models, and faults."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
import yaml
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

TOKEN, READER = "hf_writes", "hf_reads"


@dataclass
class StoredRepository:
    """Branches and commits of a repository; a commit is files by path, each by the SHA-256 of its bytes."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, str]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, str]) -> str:
        about = json.dumps([self.branches.get(branch), sorted(files.items())])
        sha = hashlib.sha1(about.encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha


@dataclass
class Hub:
    """What a test tells the stand-in, and what that has seen.

    Attributes:
        repositories: by user/repo.
        cuts: by the end of a path, after how many bytes its next downloads are cut.
        asked: methods and paths, in order; `Range` headers behind those that had one.
    """

    url: str = ""
    repositories: dict[str, StoredRepository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    cuts: dict[str, list[int]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def put(self, name: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Commit files as a stranger might; return the commit."""
        repository = self.repositories.setdefault(name, StoredRepository(private=False))
        return repository.commit(branch, {path: self.keep(content) for path, content in files.items()})

    def keep(self, content: bytes) -> str:
        found = hashlib.sha256(content).hexdigest()
        self.blobs[found] = content
        return found

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        repository = self.repositories[name]
        return {path: self.blobs[found] for path, found in repository.commits[repository.branches[branch]].items()}


def application(hub: Hub) -> FastAPI:
    app = FastAPI()

    @app.middleware("http")
    async def watched(request: Request, call_next: Any) -> Any:
        span = request.headers.get("range")
        hub.asked.append(" ".join(filter(None, (request.method, request.url.path, span))))
        return await call_next(request)

    def refused(request: Request, *, writes: bool = False) -> Response | None:
        token = (request.headers.get("authorization") or "").removeprefix("Bearer ")
        if writes and token != TOKEN:
            return _error(403 if token == READER else 401, None, "no write token")
        return None

    def found(request: Request, name: str, revision: str) -> tuple[StoredRepository, str] | Response:
        repository = hub.repositories.get(name)
        token = (request.headers.get("authorization") or "").removeprefix("Bearer ")
        if repository is None or (repository.private and token not in (TOKEN, READER)):
            return _error(404 if token else 401, "RepoNotFound", "Repository not found")
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            return _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository, sha

    @app.post("/api/repos/create")
    async def create(request: Request) -> Response:
        if (no := refused(request, writes=True)) is not None:
            return no
        asked = await request.json()
        name = f"{asked.get('organization') or 'user'}/{asked['name']}"
        if name in hub.repositories:
            return JSONResponse({"error": "exists", "url": f"{hub.url}/{name}"}, 409)
        made = hub.repositories[name] = StoredRepository(
            asked.get("private") is True or asked.get("visibility") == "private"
        )
        made.commit("main", {".gitattributes": hub.keep(b"*.safetensors filter=lfs\n")})
        return JSONResponse({"url": f"{hub.url}/{name}", "name": name})

    @app.post("/api/validate-yaml")
    async def validate(request: Request) -> Response:
        front = (await request.json())["content"].split("---")[1]
        problems = [] if isinstance(yaml.safe_load(front), dict) else [{"message": "no metadata"}]
        return JSONResponse({"errors": problems, "warnings": []}, 400 if problems else 200)

    @app.post("/api/models/{user}/{repo}/branch/{branch}")
    async def branch_off(request: Request, user: str, repo: str, branch: str) -> Response:
        repository = hub.repositories[f"{user}/{repo}"]
        if branch in repository.branches:
            return JSONResponse({"error": "exists"}, 409)
        repository.branches[branch] = repository.branches["main"]
        return JSONResponse({})

    @app.get("/api/models/{user}/{repo}/tree/{revision}")
    async def tree(request: Request, user: str, repo: str, revision: str) -> Response:
        there = found(request, f"{user}/{repo}", revision)
        if isinstance(there, Response):
            return there
        listed = there[0].commits[there[1]].items()
        return JSONResponse([{"type": "file", "path": p, "size": len(hub.blobs[b]), "oid": b} for p, b in listed])

    @app.get("/api/models/{user}/{repo}/revision/{revision}")
    @app.get("/api/models/{user}/{repo}")
    async def info(request: Request, user: str, repo: str, revision: str = "main") -> Response:
        there = found(request, f"{user}/{repo}", revision)
        if isinstance(there, Response):
            return there
        siblings = [{"rfilename": path} for path in there[0].commits[there[1]]]
        return JSONResponse({"id": f"{user}/{repo}", "sha": there[1], "siblings": siblings, "tags": [], "downloads": 0})

    @app.post("/api/models/{user}/{repo}/preupload/{revision}")
    async def preupload(request: Request, user: str, repo: str, revision: str) -> Response:
        files = [
            {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
             "shouldIgnore": False, "oid": None}
            for one in (await request.json())["files"]
        ]  # fmt: skip
        return JSONResponse({"files": files})

    @app.post("/{user}/{repo}.git/info/lfs/objects/batch")
    async def batch(request: Request, user: str, repo: str) -> Response:
        if (no := refused(request, writes=True)) is not None:
            return no
        objects = (await request.json())["objects"]
        for one in objects:
            if one["oid"] not in hub.blobs:
                one["actions"] = {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}
        return JSONResponse({"transfer": "basic", "objects": objects})

    @app.put("/lfs/{oid}")
    async def upload(request: Request, oid: str) -> Response:
        assert hub.keep(await request.body()) == oid
        return Response()

    @app.post("/api/models/{user}/{repo}/commit/{revision}")
    async def commit(request: Request, user: str, repo: str, revision: str) -> Response:
        if (no := refused(request, writes=True)) is not None:
            return no
        there = found(request, f"{user}/{repo}", revision)
        assert not isinstance(there, Response)
        files = dict(there[0].commits[there[1]])
        for line in (await request.body()).splitlines():
            one = json.loads(line)
            if one["key"] == "file":
                files[one["value"]["path"]] = hub.keep(base64.b64decode(one["value"]["content"]))
            elif one["key"] == "lfsFile":
                files[one["value"]["path"]] = one["value"]["oid"]
            elif one["key"] == "deletedFile":
                del files[one["value"]["path"]]
        sha = there[0].commit(revision, files)
        return JSONResponse({"commitUrl": f"{hub.url}/{user}/{repo}/commit/{sha}", "commitOid": sha})

    @app.api_route("/{user}/{repo}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
    async def resolve(request: Request, user: str, repo: str, revision: str, path: str) -> Response:
        there = found(request, f"{user}/{repo}", revision)
        if isinstance(there, Response):
            return there
        blob = there[0].commits[there[1]].get(path)
        headers = {"X-Repo-Commit": there[1], "Accept-Ranges": "bytes"}
        if blob is None:
            return _error(404, "EntryNotFound", "Entry not found", headers)
        content, status, span = hub.blobs[blob], 200, request.headers.get("range")
        if span is not None:
            start = int(span.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            content, status = content[start:], 206
        headers |= {"ETag": f'"{blob}"', "Content-Length": str(len(content))}
        if request.method == "HEAD":
            return Response(headers=headers)
        cuts = next((cuts for end, cuts in hub.cuts.items() if path.endswith(end) and cuts), None)
        return StreamingResponse(_sent(content, cuts.pop(0) if cuts else None), status, headers)

    return app


def _sent(content: bytes, cut: int | None) -> Iterator[bytes]:
    yield content[:cut]
    if cut is not None:
        raise ConnectionError("cut on purpose")


def _error(status: int, code: str | None, message: str, headers: dict[str, str] | None = None) -> Response:
    named = {"X-Error-Code": code} if code else {}
    return JSONResponse({"error": message}, status, {"X-Error-Message": message, **named, **(headers or {})})


@contextmanager
def standing_in() -> Iterator[Hub]:
    """Serve until the block ends."""
    hub = Hub()
    config = uvicorn.Config(application(hub), host="127.0.0.1", port=0, log_level="critical", ws="none", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.01)
        assert thread.is_alive()
    hub.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield hub
    finally:
        server.should_exit = True
        thread.join()
