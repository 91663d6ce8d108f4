"""`hf-kvquant serve`: transformers' own server answers OpenAI clients from quantized pages."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from commands import call
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_kvquant import host
from hf_kvquant.measure.text import bundled_model
from hf_kvquant.scoring import DENSE

try:
    host.continuous_batching()
except ImportError:
    pytest.skip("transformers before 5.23 has other pages", allow_module_level=True)

PROMPTS = ["def pop(self):\n", "class Queue:", "import os\n\n"]
NEW = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained model, because the text that a stream decodes piece by piece has to be UTF-8. Chats get a template."""
    folder = shutil.copytree(bundled_model(), tmp_path_factory.mktemp("served") / "model")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    return folder


class TestErrors:
    def test_a_missing_package_is_named(self, folder, monkeypatch):
        monkeypatch.setattr(host.importlib.util, "find_spec", lambda name: None if name == "uvicorn" else name)
        result = call("serve", folder, code=1)
        assert "the server needs uvicorn: pip install 'transformers[serving]'" in result.output

    def test_an_older_transformers_is_told(self, folder, monkeypatch):
        monkeypatch.setattr(host, "VERSION", "5.22.1")
        assert "quantized pages need transformers 5.23 or newer" in call("serve", folder, code=1).output

    def test_attention_that_a_model_needs_is_passed_on(self, folder, monkeypatch):
        given = {}
        monkeypatch.setattr(host, "run_server", lambda prepare, **options: given.update(options))
        for arguments, expected in (([], "sdpa"), (["--attn", "eager"], "eager")):
            call("serve", folder, *arguments)
            assert given["attn_implementation"] == expected

    def test_clients_name_a_folder_as_the_command_did(self, folder, monkeypatch):
        given = {}
        monkeypatch.setattr(host, "run_server", lambda prepare, **options: given.update(options))
        monkeypatch.chdir(folder.parent)
        call("serve", f"./{folder.name}")
        assert given["force_model"] == f"./{folder.name}"

    def test_names_that_are_wrong(self, folder):
        assert "does not exist" in call("serve", "./nowhere", code=2).output
        assert "dense pages are served by" in call("serve", folder, "--preset", DENSE, code=2).output
        assert (
            "either a preset or a config" in call("serve", folder, "--preset", "int8", "--config", "x", code=2).output
        )


@pytest.fixture(scope="module")
def openai():
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    return pytest.importorskip("openai")


def command(*arguments):
    line = "import hf_kvquant_entry; hf_kvquant_entry.main()"
    path = os.pathsep.join(p for p in sys.path if p)
    environment = os.environ | {"PYTHONPATH": path, "COLUMNS": "140", "NO_COLOR": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", line, "serve", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        cwd=Path(__file__).parent,  # in the repository's folder Python would import the source
    )  # fmt: skip


@pytest.fixture(scope="module")
def client(openai, folder):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    server = command(folder, "--preset", "int8", "--port", port, "--num-blocks", 16, "--dtype", "float32")
    client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", timeout=60, max_retries=0)
    until = time.monotonic() + 120
    try:
        while True:
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                assert server.poll() is None, server.stdout.read()
                assert time.monotonic() < until
                time.sleep(0.3)
        yield client
    finally:
        server.terminate()
        said = server.communicate(timeout=20)[0]
    assert f"Serving {folder} at http://localhost:{port}/v1 with the int8 cache" in said


def ask(client, folder, prompt, **options):
    return client.completions.create(model=str(folder), prompt=prompt, max_tokens=NEW, temperature=0, **options)


@pytest.fixture(scope="module")
def alone(folder):
    """What each prompt gets from `generate` with the same cache."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = {}
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        new = model.generate(ids, cache_implementation="kvquant-int8", max_new_tokens=NEW, do_sample=False)
        texts[prompt] = tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)
    return texts


class TestClients:
    def test_several_at_once(self, client, folder, alone):
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            answers = list(pool.map(lambda prompt: ask(client, folder, prompt), PROMPTS))
        assert [answer.choices[0].text for answer in answers] == [alone[prompt] for prompt in PROMPTS]
        assert {answer.usage.completion_tokens for answer in answers} == {NEW}

    def test_a_stream(self, client, folder, alone):
        pieces = [part.choices[0].text for part in ask(client, folder, PROMPTS[0], stream=True) if part.choices]
        assert len(pieces) > 3 and "".join(pieces) == alone[PROMPTS[0]]

    def test_a_client_that_goes_away(self, client, folder, alone):
        with ask(client, folder, PROMPTS[1], stream=True) as stream:
            next(iter(stream))
        assert ask(client, folder, PROMPTS[2]).choices[0].text == alone[PROMPTS[2]]


def test_the_chat_of_transformers(client, folder, tmp_path):
    """Its second line answers whether to go on after the last token."""
    line = "from transformers.cli.transformers import main; main()"
    address = str(client.base_url).removesuffix("/v1/")
    command = [sys.executable, "-c", line, "chat", str(folder), address, "max_new_tokens=8", "do_sample=False"]
    environment = os.environ | {"NO_COLOR": "1", "HF_HUB_OFFLINE": "0"}
    lines = f"{PROMPTS[1]}\nn\n!exit\n"
    done = subprocess.run(command, input=lines, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    messages = [{"role": "user", "content": PROMPTS[1]}]
    answer = client.chat.completions.create(model=str(folder), messages=messages, max_tokens=8, temperature=0)
    # The terminal shows the answer as Markdown.
    assert re.search(r"\w+", answer.choices[0].message.content)[0] in done.stdout


def test_what_cannot_be_served_is_named_at_the_start(openai, folder):
    server = command(folder, "--page-size", 100)
    said = server.communicate(timeout=120)[0]
    assert server.returncode == 2, said
    assert "page_size: 100 is not allowed" in said
