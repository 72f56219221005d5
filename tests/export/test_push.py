"""Adapters go to a small Hub on loopback by every way there is, and come back equal."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, constants
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageClassification

from surgical_peft import SurgicalConfig, SurgicalError, export_to_peft
from surgical_peft.cli.main import main
from surgical_peft.experiments.recipe import load_recipe
from surgical_peft.experiments.training.train import train
from surgical_peft.export import adapter_card
from surgical_peft.export.card_text import END, HERE
from surgical_peft.export.export import export
from surgical_peft.export.push import push
from tests.support.hub_server import TOKEN, Hub, running_hub
from tests.support.tiny import write_recipe

VIT = Path(__file__).parents[2] / "recipes" / "fashion_mnist" / "vit"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as server:
        yield server


@pytest.fixture
def online(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """The Hub for calls in this process, where huggingface_hub is imported already."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as `train` leaves it, as far as a push looks at it: an adapter of changed weights with a card."""
    folder = tmp_path_factory.mktemp("run")
    model = get_peft_model(AutoModelForImageClassification.from_pretrained(VIT), SurgicalConfig(blocks=[1, -1]))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
        torch.save(model.eval()(torch.ones(2, 1, 28, 28)).logits, folder / "logits.pt")
    model.save_pretrained(folder / "adapter")
    return folder


def python(hub: Hub, home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, to which the small Hub is the Hub."""
    ours = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    environment = {**os.environ, **ours, "HF_HUB_OFFLINE": "0", **environment}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


def card_of(hub: Hub, name: str) -> str:
    return hub.repositories[name].files["README.md"].decode()


PUSH_AND_LOAD = """
import re, sys, torch
from huggingface_hub import HfApi, ModelCard
from peft import PeftModel
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments
import surgical_peft

folder, work, logits, *names = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForImageClassification.from_pretrained("someone/vit"), folder)
model.peft_config["default"].base_model_name_or_path = "someone/vit"
model.push_to_hub("someone/by-model")
where = {"hub_model_id": "someone/by-trainer", "hub_private_repo": True}
args = TrainingArguments(work, report_to="none", use_cpu=True, **where)
Trainer(model=model, args=args).push_to_hub()
HfApi().upload_file(path_in_repo="README.md", repo_id="someone/by-model", path_or_fileobj=b"# Mine\\n\\nBy hand.\\n")
model.push_to_hub("someone/by-model")

expected = torch.load(logits)
for name in names:
    card = ModelCard.load(name)
    card.validate()
    code = re.findall(r"```python\\n(.*?)```", card.text, re.DOTALL)[0]
    variables = {}
    exec(code.replace("this folder or repository", name).replace("folder of the base model", "someone/vit"), variables)
    assert torch.equal(variables["model"].eval()(torch.ones(2, 1, 28, 28)).logits, expected), name
"""

LOAD_WITHOUT_US = """
import os, sys, torch
from huggingface_hub import hf_hub_download
from peft import PeftModel
from transformers import ViTForImageClassification

expected = torch.load(sys.argv[1])
model = PeftModel.from_pretrained(ViTForImageClassification.from_pretrained("someone/vit"), "someone/stock")
assert torch.equal(model.eval()(torch.ones(2, 1, 28, 28)).logits, expected)
os.chdir(os.path.dirname(hf_hub_download("someone/by-command", "adapter_model.safetensors")))
exec(sys.argv[2].replace("folder of the base model", "someone/vit"))
assert torch.equal(base_model.eval()(torch.ones(2, 1, 28, 28)).logits, expected)
assert "surgical_peft" not in sys.modules
"""


def test_pushed_by_every_way_and_loaded_back_with_and_without_us(
    online: Hub, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    api = HfApi()
    export_to_peft(made / "adapter", tmp_path / "stock")
    for name, folder in (("someone/vit", VIT), ("someone/stock", tmp_path / "stock")):
        api.create_repo(name)
        api.upload_folder(repo_id=name, folder_path=folder)

    monkeypatch.setattr("sys.argv", ["surgical-peft", "push", str(made), "someone/by-command", "--json"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code and json.loads(capsys.readouterr().out)["private"] is True
    names = ["someone/by-command", "someone/by-model", "someone/by-trainer"]
    paths = [str(made / "adapter"), str(tmp_path / "work"), str(made / "logits.pt")]
    done = python(online, tmp_path, "-c", PUSH_AND_LOAD, *paths, *names)
    assert done.returncode == 0, done.stderr
    for name in names:
        text = card_of(online, name)
        assert "the blocks `1`, `5`**" in text and text.count("import surgical_peft") == 2
        assert "[More Information Needed]" not in text
        assert (HERE in text.partition("safetensors")[0]) == (name == "someone/by-trainer")  # Trainer tells no name
    first = online.repositories["someone/by-model"].commits[1][1]["README.md"].decode()
    assert "[More Information Needed]" not in first and "# Surgical fine-tuning" in first
    commit = online.repositories["someone/vit"].commits[-1][0]
    assert f"[someone/vit](https://huggingface.co/someone/vit), commit `{commit}`" in first
    assert "base_model: someone/vit" in card_of(online, "someone/by-model")
    assert card_of(online, "someone/by-model").partition(END)[2].startswith("\n\n# Mine\n\nBy hand.\n")
    assert online.repositories["someone/by-command"].private
    assert set(online.repositories["someone/by-command"].files) == {
        ".gitattributes",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert online.repositories["someone/by-trainer"].private
    plain = re.findall(r"```python\n(.*?)```", card_of(online, "someone/by-command"), re.DOTALL)[1]
    done = python(online, tmp_path, "-c", LOAD_WITHOUT_US, str(made / "logits.pt"), plain)
    assert done.returncode == 0, done.stderr


def test_private_unless_public_is_said(online: Hub, made: Path) -> None:
    assert push(made, "someone/one").private and online.repositories["someone/one"].private
    pushed = push(made, "two", public=True)
    assert pushed.repository == "someone/two"  # the user's own name is before it
    assert not pushed.private and not online.repositories["someone/two"].private
    assert pushed.commit.startswith(f"{online.url}/someone/two/commit/")
    assert '"someone/two"' in card_of(online, "someone/two") and f'"{HERE}"' not in card_of(online, "someone/two")
    assert f'"{HERE}"' in (made / "adapter" / "README.md").read_text()  # the one at home is as it was


def test_the_help_says_that_it_is_private(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["surgical-peft", "push", "--help"])
    with pytest.raises(SystemExit):
        main()
    text = " ".join(capsys.readouterr().out.split())
    assert "as a private repository unless you say --public" in text


def test_a_name_that_exists_is_refused(online: Hub, made: Path) -> None:
    push(made, "someone/one")
    before = list(online.repositories["someone/one"].commits)
    for name in ("someone/one", "one"):
        with pytest.raises(SurgicalError, match=r"someone/one .*not empty"):
            push(made, name)
    assert online.repositories["someone/one"].commits == before


def test_a_push_that_did_not_get_through_can_be_done_again(online: Hub, made: Path) -> None:
    online.faults = {"commit": 413}
    with pytest.raises(SurgicalError, match=r"'someone/one' \(no more room\)"):
        push(made, "someone/one")
    assert list(online.repositories["someone/one"].files) == [".gitattributes"]
    online.faults = {}
    with pytest.raises(SurgicalError, match=r"private.*public"):
        push(made, "someone/one", public=True)
    assert push(made, "someone/one").repository == "someone/one"


@pytest.mark.parametrize(
    ("repository", "token", "message"),
    [
        ("someone/one", None, "`hf auth login`"),
        ("someone/one", "hf_other", "not valid"),
        ("elsewhere/one", TOKEN, "may not write"),
        ("a/b/c", TOKEN, "'a/b/c'"),
        ("someone/with space", TOKEN, "cannot be a repository's name"),
    ],
)
def test_what_the_hub_refuses_is_said(
    online: Hub, made: Path, monkeypatch: pytest.MonkeyPatch, repository: str, token: str | None, message: str
) -> None:
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(SurgicalError, match=re.escape(message)):
        push(made, repository)
    assert online.repositories == {}


@pytest.mark.parametrize("fault", [401, 403, 503, "cut", "text", "other", "silent"])
def test_a_hub_that_fails_anywhere_is_told_in_one_line_and_has_no_commit(
    online: Hub, made: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: int | str
) -> None:
    """A failing upload was a RuntimeError, other answers a JSONDecodeError, a silent Hub was waited for for ever."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between the retries
    for number, call in enumerate(("create", "preupload", "lfs_batch", "lfs_put", "commit")):
        if call == "lfs_put" and fault in ("text", "other"):
            continue  # nobody reads its answer
        online.faults = {call: fault}
        with monkeypatch.context() as patch, pytest.raises(SurgicalError) as caught:
            if fault == "silent":
                patch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.03)
            push(made, f"someone/of-{number}")
        text = f"{caught.value}{caplog.text}"
        assert "\n" not in str(caught.value) and TOKEN not in text and str(made) not in text and "/lfs/" not in text
    assert all(len(repository.commits) == 1 for repository in online.repositories.values())
    online.faults = {}
    assert push(made, "someone/of-2").repository == "someone/of-2"


def test_adapters_of_other_methods_are_pushed_as_peft_does(tmp_path: Path) -> None:
    base = AutoModelForImageClassification.from_pretrained(VIT)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "query"]))
    model.save_pretrained(tmp_path)
    pushed = []
    adapter_card._upload(
        lambda *_: pushed.append((tmp_path / "adapter_config.json").read_text()), model, str(tmp_path), "a/b"
    )
    assert json.loads(pushed[0])["base_model_name_or_path"] == str(VIT)


def test_no_network_is_said(online: Hub, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port, where nobody listens
    with pytest.raises(SurgicalError, match=r"http://127\.0\.0\.1:9"):
        push(made, "someone/one")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SurgicalError, match="HF_HUB_OFFLINE is set"):
        push(made, "someone/one")


def test_a_card_that_the_hub_refuses_is_said(online: Hub, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "run")
    card = tmp_path / "run" / "adapter" / "README.md"
    card.write_text(card.read_text().replace("---\n", "---\nbase_model: /my/folder\n", 1))
    with pytest.raises(SurgicalError, match=r'(?s)card.*"base_model" with value "/my/folder"'):
        push(tmp_path / "run", "someone/one")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("README.md", "`surgical-peft card"),
        ("adapter_model.safetensors", "train first"),
        ("adapter_config.json", "train first"),
    ],
)
def test_a_folder_without_its_parts_is_refused(
    online: Hub, made: Path, tmp_path: Path, missing: str, message: str
) -> None:
    shutil.copytree(made, tmp_path / "run")
    (tmp_path / "run" / "adapter" / missing).unlink()
    with pytest.raises(SurgicalError, match=f"{missing}.*{message}"):
        push(tmp_path / "run", "someone/one")
    assert online.repositories == {}


def test_an_error_of_the_command_is_one_line(made: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("sys.argv", ["surgical-peft", "push", str(made), "someone/one"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: HF_HUB_OFFLINE is set")


@pytest.fixture(scope="module")
def hidden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model, data and results lie in a folder that nobody is to know of, by a recipe that says where."""
    folder = tmp_path_factory.mktemp("Secret-Client")
    path = write_recipe(folder, model=str(folder / "model"), data=str(folder / "data"), blocks=["head"], max_steps=1)
    train(load_recipe(path))
    assert "Secret-Client" in (folder / "run" / "adapter" / "adapter_config.json").read_text()
    return folder / "run"


def test_where_things_lie_is_not_published(online: Hub, hidden: Path) -> None:
    push(hidden, "someone/one")
    files = online.repositories["someone/one"].files
    assert {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "preprocessor_config.json",
    } <= files.keys()
    for name, content in files.items():
        assert b"Secret-Client" not in content and TOKEN.encode() not in content, name
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] is None
    kept = json.loads((hidden / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert kept == str(hidden.parent / "model")  # by which it is still loaded here


def test_what_is_published_loads_on_its_base(online: Hub, hidden: Path, tmp_path: Path) -> None:
    push(hidden, "someone/one")
    for name, content in online.repositories["someone/one"].files.items():
        (tmp_path / name).write_bytes(content)
    base = AutoModelForImageClassification.from_pretrained(hidden.parent / "model")
    PeftModel.from_pretrained(base, tmp_path)
    with pytest.raises(SurgicalError, match="--base"):
        export(tmp_path, tmp_path / "merged", "merged")
    export(tmp_path, tmp_path.with_name("merged"), "merged", base_model=hidden.parent / "model")


def test_a_name_of_the_hub_stays(online: Hub, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "run")
    path = tmp_path / "run" / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "google/vit"}))
    push(tmp_path / "run", "someone/one")
    pushed = online.repositories["someone/one"].files["adapter_config.json"]
    assert json.loads(pushed)["base_model_name_or_path"] == "google/vit"


def test_pushing_a_model_says_as_little(hidden: Path, tmp_path: Path) -> None:
    base = AutoModelForImageClassification.from_pretrained(hidden.parent / "model")
    model = PeftModel.from_pretrained(base, hidden / "adapter")
    model.save_pretrained(tmp_path)
    uploaded: dict[str, bytes] = {}

    def upload(folder: str, repository: str) -> None:
        uploaded.update({path.name: path.read_bytes() for path in Path(folder).iterdir()})

    adapter_card._upload(upload, model, str(tmp_path), "someone/one")
    assert uploaded.keys() >= {"README.md", "adapter_config.json"}
    assert all(b"Secret-Client" not in content for content in uploaded.values())
    assert "Secret-Client" in (tmp_path / "adapter_config.json").read_text()  # the one at home is as it was


def test_only_files_of_an_adapter_are_pushed(
    online: Hub, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made, tmp_path / "run")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "key.json").write_text('"secret"')
    adapter = tmp_path / "run" / "adapter"
    (adapter / "link.json").symlink_to(tmp_path / "secrets" / "key.json")
    (adapter / "folder").symlink_to(tmp_path / "secrets")
    (adapter / "training_args.bin").write_bytes(b"secret")
    (adapter / ".env.txt").write_text("secret")
    (adapter / "vocab.txt").write_text("a")
    monkeypatch.setattr("sys.argv", ["surgical-peft", "push", str(tmp_path / "run"), "someone/one"])
    with pytest.raises(SystemExit):
        main()
    files = online.repositories["someone/one"].files
    assert "vocab.txt" in files and not any(b"secret" in content for content in files.values())
    told = " ".join(capsys.readouterr().out.split())
    assert all(name in told for name in ("link.json", "folder", "training_args.bin", ".env.txt"))
    weights = adapter / "adapter_model.safetensors"
    shutil.move(weights, tmp_path / "weights")
    weights.symlink_to(tmp_path / "weights")
    with pytest.raises(SurgicalError, match=r"adapter_model\.safetensors.*link"):
        push(tmp_path / "run", "someone/two")
    shutil.move(adapter, tmp_path / "elsewhere")
    adapter.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SurgicalError, match="link"):
        push(tmp_path / "run", "someone/two")


@pytest.mark.parametrize("line", ["It lies in {run}.", "See {home}/notes.txt", f"token: {TOKEN}"])
def test_a_card_that_says_too_much_is_refused(online: Hub, made: Path, tmp_path: Path, line: str) -> None:
    """As one of an earlier version, or one that was written by hand."""
    shutil.copytree(made, tmp_path / "run")
    card = tmp_path / "run" / "adapter" / "README.md"
    card.write_text(f"{card.read_text()}\n{line.format(run=tmp_path / 'run', home=Path.home())}\n")
    with pytest.raises(SurgicalError, match=r"README\.md"):
        push(tmp_path / "run", "someone/one")
    assert online.repositories == {}
