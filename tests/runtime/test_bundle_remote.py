"""A bundle in an object store opens and loads like one in a folder; a server here stands in for Google's.

What this cannot show: real credentials, TLS, and the pace of a real bucket.
"""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import jax
import numpy as np
import pytest

from runtime.bundle import Bundle
from runtime.engine import Engine
from runtime.errors import InputError
from runtime.graphs import GraphKey
from runtime.manifest import MANIFEST
from tests.bundles import copy_without_graphs, edit_manifest

ROOT = Path(__file__).parents[2]
BUCKET = "a-bucket"


class Objects(BaseHTTPRequestHandler):
    """The part of Google's storage API that reading takes: objects, ranges of them, and lists by page."""

    root: Path
    asked: list[str]
    page = 20

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        self.asked.append(address.path)
        query = {name: values[0] for name, values in parse_qs(address.query).items()}
        prefix = f"/storage/v1/b/{BUCKET}/o"
        if address.path == prefix:
            self._answer(200, json.dumps(self._list(query)).encode())
            return
        path = self.root / unquote(address.path.removeprefix(f"{prefix}/"))
        if not address.path.startswith(f"{prefix}/") or not path.is_file():
            self._answer(404, b"{}")
            return
        content = path.read_bytes()
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span is None:
            self._answer(200, content)
            return
        first, last = int(span[1]), min(int(span[2] or len(content)), len(content) - 1)
        where = f"bytes {first}-{last}/{len(content)}"
        self._answer(206, content[first : last + 1], {"Content-Range": where})

    def _list(self, query: dict[str, str]) -> dict[str, object]:
        names = sorted(path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file())
        prefix, begin, end = query.get("prefix", ""), query.get("startOffset", ""), query.get("endOffset", "\x7f")
        names = [name for name in names if name.startswith(prefix) and begin <= name < end]
        after = int(query.get("pageToken", 0))
        more = {"nextPageToken": str(after + self.page)} if len(names) > after + self.page else {}
        return {"items": [{"name": name} for name in names[after : after + self.page]], **more}

    def _answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), "x-goog-generation": "1", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def bucket(tmp_path_factory) -> Iterator[type[Objects]]:
    """An empty bucket whose objects are the files of `root`; its name is `BUCKET`."""
    handler = type("Handler", (Objects,), {"root": tmp_path_factory.mktemp("bucket"), "asked": []})
    server = ThreadingHTTPServer(("localhost", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://localhost:{server.server_address[1]}")
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "abc")
        yield handler
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def stored(bucket, tiny_bundle) -> str:
    copy_without_graphs(tiny_bundle, bucket.root / "models" / "tiny")
    return f"gs://{BUCKET}/models/tiny"


def test_a_bundle_in_a_bucket_has_the_same_weights(stored, bucket, tiny_bundle):
    bucket.asked.clear()
    remote, local = Bundle.open(stored), Bundle.open(tiny_bundle)
    assert (remote.config, remote.groups, remote.files) == (local.config, local.groups, local.files)
    fetched = {unquote(path).rpartition("/tiny/")[2] for path in bucket.asked}
    assert {MANIFEST, "tokenizer.json"} <= fetched
    assert not any(name.startswith("weights/") for name in fetched)
    jax.tree.map(np.testing.assert_array_equal, remote.load_params(), local.load_params())
    remote.verify()


def test_text_is_tokenised_with_what_the_bucket_holds(stored, tiny_bundle):
    engines = [Engine.open(stored), Engine.open(tiny_bundle)]
    remote, local = (engine.prepare([{"role": "user", "content": "Hello there"}]) for engine in engines)
    assert np.array_equal(remote.token_ids, local.token_ids)


def test_any_address_that_tensorstore_knows_will_do(golden_bundle):
    remote = Bundle.open(f"{golden_bundle.as_uri()}/")
    jax.tree.map(np.testing.assert_array_equal, remote.load_params(), Bundle.open(golden_bundle).load_params())


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (f"gs://{BUCKET}/models/nothing", f"gs://{BUCKET}/models/nothing/manifest.json does not exist"),
        ("gs://no such bucket/x", "cannot be read"),
        ("carrier-pigeon://x/y", "cannot be read"),
    ],
)
def test_an_address_without_a_bundle_is_an_input_error(bucket, address, message):
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        Bundle.open(address)
    assert "\n" not in str(caught.value)


def first_weights(root: Path) -> Path:
    return next(path for path in sorted((root / "weights").rglob("d/*")) if path.is_file())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGED = {
    "weights missing": (lambda root: first_weights(root).unlink(), "is missing from the bundle"),
    "tokenizer altered": (lambda root: flip(root / "tokenizer.json"), "tokenizer.json differs from its sha256"),
    "tokenizer missing": (lambda root: (root / "tokenizer.json").unlink(), "tokenizer.json does not exist"),
    "manifest altered": (lambda root: flip(root / MANIFEST), MANIFEST),
    "file climbs": (
        lambda root: edit_manifest(root, lambda m: m["files"].append({**m["files"][0], "path": "../../x"})),
        "file entry '../../x'",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_bundle_in_a_bucket_does_not_open(bucket, tiny_bundle, case):
    root = copy_without_graphs(tiny_bundle, bucket.root / case.replace(" ", "-"))
    damage, message = DAMAGED[case]
    damage(root)
    with pytest.raises(InputError, match=re.escape(message)):
        Bundle.open(f"gs://{BUCKET}/{root.name}")


def test_altered_weights_in_a_bucket_fail_verification(bucket, tiny_bundle):
    root = copy_without_graphs(tiny_bundle, bucket.root / "altered")
    flip(first_weights(root))
    with pytest.raises(InputError, match=f"gs://{BUCKET}/altered/weights/.* differs from its sha256"):
        Bundle.open(f"gs://{BUCKET}/altered").verify()


def test_a_bundle_in_a_bucket_takes_no_graphs(stored):
    bundle = Bundle.open(stored)
    key = GraphKey("decode", "cpu", 1, (1, 512))
    with pytest.raises(OSError, match="own folder"):
        bundle.add_graph(key, None)  # pyright: ignore[reportArgumentType]
    assert key not in bundle.graphs


def test_the_temporary_folder_goes_with_the_process(tiny_bundle, tmp_path):
    program = "import sys; from runtime.bundle import Bundle; print(Bundle.open(sys.argv[1]).path)"
    command = [sys.executable, "-c", program, tiny_bundle.as_uri()]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).parent == tmp_path
    assert list(tmp_path.iterdir()) == []
