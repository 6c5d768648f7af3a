"""Model cards; the hub (replaced on the loopback address) and its cache; local folders first."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import peft
import pytest
import torch
from huggingface_hub import ModelCard

import peftkern
from tests.closeness import assert_same_number
from tests.tiny import assert_same, first, inputs, make, pair, snapshot

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
DOUBLE = {"dtype": torch.float64}

# ---------------------------------------------------------------- model cards


def test_card_has_what_pefts_has(tmp_path):
    cards = []
    for name, model in zip(("ours", "theirs"), pair("llama"), strict=True):
        base = model.get_base_model()
        base.__dict__["name_or_path"] = base.config._name_or_path = "owner/base"
        base.model_tags = ["tiny"]
        model.save_pretrained(tmp_path / name)
        cards.append(ModelCard.load(tmp_path / name / "README.md"))
    ours, theirs = (c.data.to_dict() for c in cards)
    assert set(ours.pop("tags")) - set(theirs.pop("tags")) == {"peftkern"}
    assert ours == theirs and ours["library_name"] == "peft" and ours["base_model"] == "owner/base"
    assert ours["pipeline_tag"] == "text-generation"
    assert '= AutoModelForCausalLM.from_pretrained("owner/base")' in cards[0].text
    assert "- `r`: 4\n" in cards[0].text and "## Training data" in cards[0].text
    assert f"- peftkern {peftkern.__version__}" in cards[0].text and "- PEFT 0." in cards[0].text


def test_card_of_the_user_is_kept_and_updated_once(tmp_path):
    ours, _ = pair("bert", "SEQ_CLS")
    (tmp_path / "README.md").write_text(
        "---\nlicense: mit\ntags: [mine]\npipeline_tag: text-ranking\n---\n\n"
        "# My adapter\n\nKept words.\n"
    )
    for _ in range(3):
        ours.create_or_update_model_card(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit" and "Kept words." in card.text and "# My adapter" in card.text
    assert card.data.pipeline_tag == "text-ranking"
    assert {"mine", "peftkern", "lora", "transformers"} <= set(card.data.tags)
    assert card.data.tags == sorted(set(card.data.tags))
    assert card.text.count("- peftkern ") == 1 and card.text.count("### Framework versions") == 1


def test_card_of_a_plain_module_and_of_a_quantised_model(tmp_path):
    model = peftkern.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(2, 2)), peftkern.LoraConfig(target_modules=["0"])
    )
    model.save_pretrained(tmp_path / "plain")
    card = ModelCard.load(tmp_path / "plain" / "README.md")
    assert card.data.tags == ["lora", "peftkern"] and card.data.base_model is None
    ours, _ = pair("llama")
    ours.config.quantization_config = {"bits": 4, "quant_method": "made_up"}
    for _ in range(2):
        ours.create_or_update_model_card(tmp_path / "plain")
    text = (tmp_path / "plain" / "README.md").read_text()
    assert text.count("- bits: 4") == 1 and "quant_method: made_up" in text


# ---------------------------------------------------------------- the hub


class Hub(BaseHTTPRequestHandler):
    """The endpoint of a hub that files are read from. ``files``: {(repository, name): bytes}."""

    protocol_version = "HTTP/1.1"
    files: dict
    asked: list
    sha = "0" * 39 + "1"

    def log_message(self, *args):
        pass

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = unquote(urlsplit(self.path).path).strip("/")
        self.asked.append(path)
        repo, found, rest = path.partition("/resolve/")
        name = rest.partition("/")[2]
        if not found:
            return self.reply(
                200, json.dumps({"id": "x", "sha": self.sha, "siblings": []}).encode()
            )
        if not any(r == repo for r, _ in self.files):
            return self.reply(404, X_Error_Code="RepoNotFound")
        if (repo, name) not in self.files:
            return self.reply(404, X_Error_Code="EntryNotFound")
        data = self.files[repo, name]
        tag = hashlib.sha1(data).hexdigest()
        self.reply(200, data, ETag=f'"{tag}"', X_Repo_Commit=self.sha)

    do_HEAD = do_GET

    def do_POST(self):
        """A repository is made, files are announced, and one commit brings them."""
        path = unquote(urlsplit(self.path).path).strip("/")
        self.asked.append(path)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        where = f"http://{self.headers['Host']}"
        if path == "api/repos/create":
            given = json.loads(body)
            repo = f"{given['organization']}/{given['name']}"
            self.files[repo, ".gitattributes"] = b""
            answer = {"url": f"{where}/{repo}"}
        elif "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            kept = {"uploadMode": "regular", "shouldIgnore": False}
            answer = {"files": [{"path": name, **kept} for name in names]}
        elif "/commit/" in path:
            repo = path.removeprefix("api/models/").partition("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    file = line["value"]
                    self.files[repo, file["path"]] = base64.b64decode(file["content"])
            answer = {"commitUrl": f"{where}/{repo}/commit/{self.sha}", "commitOid": self.sha}
        else:  # the yaml of a card
            answer = {"errors": [], "warnings": []}
        self.reply(200, json.dumps(answer).encode(), Content_Type="application/json")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with a good and a half adapter: arguments that lead to it, and what it was asked."""
    ours, _ = pair("llama")
    ours.save_pretrained(tmp_path / "adapter")
    names = os.listdir(tmp_path / "adapter")
    files = {("owner/lora", n): (tmp_path / "adapter" / n).read_bytes() for n in names}
    files |= {("owner/lora", f"sub/{n}"): files["owner/lora", n] for n in names}
    files["owner/half", CONFIG] = files["owner/lora", CONFIG]
    handler = type("Handler", (Hub,), {"files": files, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in [("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)]:
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("NO_PROXY", "*")
    huggingface_hub.close_session()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    yield (
        {"endpoint": url, "cache_dir": str(tmp_path / "cache"), "token": False},
        files,
        handler.asked,
    )
    server.shutdown()
    server.server_close()
    huggingface_hub.close_session()


def test_from_the_hub(hub, tmp_path):
    where, files, asked = hub
    saved = peftkern.load_peft_weights(tmp_path / "adapter", "cpu")
    for more in ({}, {"subfolder": "sub"}, {"revision": "main"}):
        asked.clear()
        config = peftkern.PeftConfig.from_pretrained("owner/lora", **where, **more)
        assert type(config) is peftkern.LoraConfig and config.r == 4
        model = peftkern.PeftModel.from_pretrained(make("llama"), "owner/lora", **where, **more)
        model.load_adapter("owner/lora", "second", **where, **more)
        for name in ("default", "second"):
            state = peftkern.get_peft_model_state_dict(model, adapter_name=name)
            assert state.keys() == saved.keys() and all(
                torch.equal(state[k], v) for k, v in saved.items()
            )
        folder = "sub/" if "subfolder" in more else ""
        assert (
            all(path.startswith(f"owner/lora/resolve/main/{folder}adapter_") for path in asked)
            and asked
        )


@pytest.mark.parametrize("repository", ["owner/half", "owner/nothing"])
def test_repositories_without_an_adapter(hub, repository):
    where, _, _ = hub
    base = make("llama")
    before = snapshot(base)
    with pytest.raises((ValueError, OSError), match=repository):
        peftkern.PeftModel.from_pretrained(base, repository, **where)
    assert_same(base, before)


@pytest.mark.parametrize("how", ["local_files_only", "offline", "unreachable"])
def test_from_the_cache_without_a_network(hub, how, monkeypatch):
    where, _, asked = hub
    peftkern.PeftModel.from_pretrained(make("llama"), "owner/lora", **where)
    asked.clear()
    if how == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    more = {"local_files_only": True} if how == "local_files_only" else {}
    if how == "unreachable":
        where = {**where, "endpoint": "http://127.0.0.1:9"}
    model = peftkern.PeftModel.from_pretrained(make("llama"), "owner/lora", **where, **more)
    assert peftkern.PeftConfig.from_pretrained("owner/lora", **where, **more).r == 4
    assert asked == [] and model.active_adapters == ["default"]
    if how != "unreachable":
        with pytest.raises((ValueError, OSError)):  # not in the cache
            peftkern.PeftModel.from_pretrained(make("llama"), "owner/other", **where, **more)


def test_a_local_folder_is_taken_before_the_hub(hub, tmp_path, monkeypatch):
    where, _, asked = hub
    monkeypatch.chdir(tmp_path)
    ours = peftkern.get_peft_model(make("llama"), peftkern.LoraConfig(r=7, task_type="CAUSAL_LM"))
    ours.save_pretrained("owner/lora")
    model = peftkern.PeftModel.from_pretrained(make("llama"), "owner/lora", **where)
    model.load_adapter("owner/lora", "second", **where)
    assert {c.r for c in model.peft_config.values()} == {7} and asked == []
    os.remove(f"owner/lora/{WEIGHTS}")  # and its other half is not fetched from elsewhere
    with pytest.raises(ValueError, match=WEIGHTS):
        peftkern.PeftModel.from_pretrained(make("llama"), "owner/lora", **where)
    assert asked == []


def test_pushed_to_the_hub_and_loaded_from_it(hub, monkeypatch):
    where, files, asked = hub
    url, constants = where["endpoint"], huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # one that asks this endpoint
    monkeypatch.setattr(constants, "HF_HUB_CACHE", where["cache_dir"])
    ours, theirs = pair("llama", **DOUBLE)
    ours.push_to_hub("owner/pushed", token="t")
    assert "api/models/owner/pushed/commit/main" in asked
    sent = {name for repo, name in files if repo == "owner/pushed"}
    assert sent == {CONFIG, WEIGHTS, "README.md", ".gitattributes"}
    assert b"library_name: peft" in files["owner/pushed", "README.md"]
    loaded = peftkern.PeftModel.from_pretrained(make("llama", **DOUBLE), "owner/pushed", **where)
    batch = inputs("llama")
    assert_same_number(first(loaded(**batch)), first(theirs.eval()(**batch)))


class NoNetwork(RuntimeError):
    pass


@pytest.fixture
def no_network(monkeypatch):
    """Any connection is an error."""

    def refuse(*args, **kwargs):
        raise NoNetwork(args)

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_local_work_asks_nobody(no_network, tmp_path):
    """Making, saving and loading, also for a base model that has the name of a repository."""
    base = make("llama")
    base.__dict__["name_or_path"] = base.config._name_or_path = "owner/base"
    ours = peftkern.get_peft_model(base, peftkern.LoraConfig(task_type="CAUSAL_LM"))
    ours.save_pretrained(tmp_path)
    again = peftkern.PeftModel.from_pretrained(make("llama"), str(tmp_path))
    again.load_adapter(tmp_path, "second")
    assert (
        peftkern.PeftConfig.from_pretrained(str(tmp_path)).base_model_name_or_path == "owner/base"
    )
    for incomplete in (WEIGHTS, CONFIG):
        os.remove(tmp_path / incomplete)
        untouched = make("llama")
        before = snapshot(untouched)
        with pytest.raises(ValueError, match=incomplete):
            peftkern.PeftModel.from_pretrained(untouched, tmp_path)
        assert_same(untouched, before)


@pytest.fixture
def uploads(monkeypatch):
    """The list of pushes: (repository, {file: bytes}, keyword arguments) of each."""
    sent = []

    def create_repo(self, repo_id, **kwargs):
        return huggingface_hub.RepoUrl(
            f"http://127.0.0.1:9/{repo_id}", endpoint="http://127.0.0.1:9"
        )

    def create_commit(self, repo_id, operations, **kwargs):
        files = {}
        for operation in operations:
            source = operation.path_or_fileobj
            files[operation.path_in_repo] = (
                source if isinstance(source, bytes) else Path(source).read_bytes()
            )
        sent.append((repo_id, files, kwargs))

    def nothing_there(*args, **kwargs):
        raise huggingface_hub.errors.EntryNotFoundError("a new repository has no card")

    monkeypatch.setattr(huggingface_hub.repocard, "hf_hub_download", nothing_there)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    return sent


def test_push_to_hub(uploads, no_network, tmp_path):
    ours, theirs = pair("llama", **DOUBLE)
    ours.push_to_hub("owner/new", commit_message="first", private=True)
    (repo, files, kwargs) = uploads[0]
    assert repo == "owner/new" and kwargs["commit_message"] == "first"
    assert {CONFIG, WEIGHTS, "README.md"} == set(files)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    batch = inputs("llama")
    for library in (peftkern, peft):
        model = library.PeftModel.from_pretrained(make("llama", **DOUBLE), tmp_path)
        assert_same_number(first(model(**batch)), first(theirs.eval()(**batch)))
    assert "peftkern" in ModelCard.load(tmp_path / "README.md").data.tags


def test_push_a_config(uploads, no_network):
    config = peftkern.LoraConfig(r=3)
    config.push_to_hub("owner/config")
    assert uploads[0][0] == "owner/config" and json.loads(uploads[0][1][CONFIG])["r"] == 3
