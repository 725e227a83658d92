"""A Hub on loopback: what huggingface_hub needs to create a repository, push to it and read from it, and faults."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = 'hf_loopbackloopbackloopback'


class LoopbackHub:
    """Serves on 127.0.0.1; repositories are dicts of files, each commit is kept.

    Attributes:
        url: for `HF_ENDPOINT`.
        commits: for each repository a list of (message, files).
        faults: for a path's part, a list of answers to give first: a status, or 'reset'.
        role: of the token: 'write' or 'read'.
    """

    def __init__(self) -> None:
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.private: dict[str, bool] = {}
        self.asked_for: dict[str, Any] = {}
        self.lfs: dict[str, bytes] = {}
        self.faults: dict[str, list[int | str]] = {}
        self.requests: list[str] = []
        self.cards: list[str] = []
        self.role = 'write'
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'

            def log_message(self, *_) -> None: ...

            def do_GET(self) -> None:
                hub.answer(self)

            do_HEAD = do_POST = do_PUT = do_GET

        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self.server.server_address[1]}'
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo: str) -> dict[str, bytes]:
        return self.commits[repo][-1][1]

    # ------------------------------------------------------------------------------------------------------- answers

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = urllib.parse.unquote(urllib.parse.urlparse(request.path).path)
        self.requests.append(f'{request.command} {path}')
        for part, answers in self.faults.items():
            if part in path and answers:
                fault = answers.pop(0)
                if fault == 'reset':  # in the middle of what the client sends
                    request.rfile.read(min(1000, int(request.headers.get('Content-Length', 0))))
                    request.connection.close()
                    request.close_connection = True
                    return None
                self.body(request)
                self.send(request, fault, {'error': f'fault {fault}'})
                return None
        body = self.body(request)
        anyone = path in ('/', '/api/validate-yaml') or path.startswith('/upload/') or '/resolve/' in path
        if not anyone and request.headers.get('Authorization') != f'Bearer {TOKEN}':
            return self.send(request, 401, {'error': 'Invalid username or password.'})
        return self.route(request, path, body)

    def route(self, request: BaseHTTPRequestHandler, path: str, body: bytes) -> None:
        if path == '/':
            return self.send(request, 200, {})
        if path == '/api/whoami-v2':
            who = {'name': 'me', 'orgs': [{'name': 'lab', 'roleInOrg': 'write'}, {'name': 'club', 'roleInOrg': 'read'}],
                   'auth': {'accessToken': {'role': self.role}}}  # fmt: skip
            return self.send(request, 200, who)
        if path == '/api/validate-yaml':
            self.cards.append(json.loads(body)['content'])
            return self.send(request, 200, {'errors': [], 'warnings': []})
        if path == '/api/repos/create':
            data = json.loads(body)
            repo = f'{data.get("organization") or "me"}/{data["name"]}'
            new = repo not in self.commits
            self.asked_for[repo] = data.get('visibility', data.get('private'))
            if new:
                self.commits[repo] = [('initial commit', {})]
                self.private[repo] = bool(data.get('private')) or data.get('visibility') == 'private'
            return self.send(request, 200 if new else 409, {'url': f'{self.url}/{repo}', 'error': 'exists'})
        if path.startswith('/upload/'):
            self.lfs[path.removeprefix('/upload/')] = body
            return self.send(request, 200, {})
        if path.endswith('/info/lfs/objects/batch'):
            objects = json.loads(body)['objects']
            for o in objects:
                o['actions'] = {'upload': {'href': f'{self.url}/upload/{o["oid"]}'}}
            return self.send(request, 200, {'transfer': 'basic', 'objects': objects})
        if '/resolve/' in path:
            repo, _, rest = path[1:].partition('/resolve/')
            return self.resolve(request, repo, rest.partition('/')[2])
        parts = path.removeprefix('/api/models/').split('/')
        repo, verb = '/'.join(parts[:2]), parts[2] if len(parts) > 2 else 'info'
        if repo not in self.commits:
            return self.send(request, 404, {'error': 'no such repository'}, {'X-Error-Code': 'RepoNotFound'})
        if verb == 'auth-check':
            return self.send(request, 200, {})
        if verb == 'preupload':
            files = [
                {'path': f['path'], 'uploadMode': 'lfs' if f['path'].endswith(('.safetensors', '.png')) else 'regular',
                 'shouldIgnore': False} for f in json.loads(body)['files']
            ]  # fmt: skip
            return self.send(request, 200, {'files': files})
        if verb == 'commit':
            return self.commit(request, repo, body)
        info = {'id': repo, 'modelId': repo, 'private': self.private[repo], 'sha': 'a' * 40, 'tags': [],
                'siblings': [{'rfilename': name} for name in self.files(repo)]}  # fmt: skip
        return self.send(request, 200, info)

    def commit(self, request: BaseHTTPRequestHandler, repo: str, body: bytes) -> None:
        files, message = dict(self.files(repo)), ''
        for line in map(json.loads, body.splitlines()):
            value = line['value']
            if line['key'] == 'header':
                message = value['summary']
            elif line['key'] == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif line['key'] == 'lfsFile':
                files[value['path']] = self.lfs[value['oid']]
                assert hashlib.sha256(files[value['path']]).hexdigest() == value['oid']
        self.commits[repo].append((message, files))
        number = len(self.commits[repo])
        self.send(request, 200, {'commitUrl': f'{self.url}/{repo}/commit/{number:040}', 'commitOid': f'{number:040}',
                                 'pullRequestUrl': None})  # fmt: skip

    def resolve(self, request: BaseHTTPRequestHandler, repo: str, name: str) -> None:
        if repo not in self.commits:
            return self.send(request, 404, {}, {'X-Error-Code': 'RepoNotFound'})
        if name not in self.files(repo):
            return self.send(request, 404, {}, {'X-Error-Code': 'EntryNotFound'})
        data = self.files(repo)[name]
        headers = {'X-Repo-Commit': f'{len(self.commits[repo]):040}', 'ETag': f'"{hashlib.sha256(data).hexdigest()}"'}
        return self.send(request, 200, data, headers)

    # ------------------------------------------------------------------------------------------------------ plumbing

    @staticmethod
    def body(request: BaseHTTPRequestHandler) -> bytes:
        if request.headers.get('Transfer-Encoding') == 'chunked':
            data = b''
            while size := int(request.rfile.readline(), 16):
                data += request.rfile.read(size)
                request.rfile.readline()
            request.rfile.readline()
            return data
        return request.rfile.read(int(request.headers.get('Content-Length') or 0))

    @staticmethod
    def send(
        request: BaseHTTPRequestHandler, status: int, data: bytes | dict, headers: dict[str, str] | None = None
    ) -> None:
        raw = data if isinstance(data, bytes) else json.dumps(data).encode()
        request.send_response(status)
        kind = 'application/octet-stream' if isinstance(data, bytes) else 'application/json'
        for name, value in {'Content-Type': kind, 'Content-Length': str(len(raw)), **(headers or {})}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != 'HEAD':
            request.wfile.write(raw)
