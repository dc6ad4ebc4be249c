"""`--push_to_hub`: what is refused before the training, and what becomes of the result if the push fails."""

import json

import pytest
from hub_server import HubServer
from runs import EMOJI, SHORT_RUN, flags
from scripts import REPOSITORY
from toy_models import TOY_CONFIG

from diffusers_adm import ADMPipeline
from diffusers_adm.training import TrainingArguments, run_settings


CLIENT = """
import contextlib, json, sys
sys.path[:0] = sys.argv[1:3]
import train_adm
from accelerate import Accelerator
from huggingface_hub import HfApi
from diffusers_adm.training import TrainingArguments, push_result

arguments = json.loads(sys.argv[3])

def refusal(error, run, *args):
    try:
        run(*args)
    except error as caught:
        print(json.dumps(str(caught)))
    else:
        raise SystemExit("nothing was refused")

HfApi(token="token-of-bob").create_repo("bob/taken")
mine = ["--hub_token", "token-of-alice"]
for others in (
    ["--hub_token", "wrong", "--hub_model_id", "alice/refused"],
    ["--hub_model_id", "alice/refused"],
    [*mine, "--hub_model_id", "bob/refused"],
    [*mine, "--hub_model_id", "bob/taken"],
):
    # There are no images: that it does not even ask for them shows that this comes first.
    refusal(ValueError, train_adm.main, [*arguments, "--push_to_hub", *others, "--data_files", "missing.parquet"])

# A run whose token is good at its start, and no longer at its end.
push = train_adm.push_result

def push_later(accelerator, training_args):
    training_args.hub_token = "wrong"
    push(accelerator, training_args)

train_adm.push_result = push_later
refusal(RuntimeError, train_adm.main, [*arguments, "--push_to_hub", *mine])
"""


def test_refusals(tmp_path):
    (tmp_path / "model.json").write_text(json.dumps(TOY_CONFIG))
    arguments = SHORT_RUN | {
        "model_config_name_or_path": tmp_path / "model.json",
        "data_files": EMOJI,
        "output_dir": tmp_path / "my-run",
        "max_train_samples": 16,
        "max_train_steps": 1,
    }
    with HubServer() as hub:
        places = (REPOSITORY / "training", REPOSITORY / "tests")
        environment = {"ACCELERATE_USE_CPU": "true", "MPLBACKEND": "Agg"}
        said = hub.run_client(
            CLIENT, *places, json.dumps(flags(**arguments)), cache=tmp_path / "cache", env=environment
        )
    *before, after = map(json.loads, (line for line in said.splitlines() if line.startswith('"')))
    for message, repo, code in zip(
        before, ("alice/refused", "alice/refused", "bob/refused", "bob/taken"), (401, 401, 403, 403), strict=True
    ):
        assert f"the repository '{repo}' cannot be made or written to" in message
        assert str(code) in message
        assert "hf auth login" in message
    assert set(hub.repositories) == {"bob/taken", "alice/my-run"}
    # The folder is whole, and the message says what to do with it.
    assert f"python -m diffusers_adm.hub push {tmp_path / 'my-run'} my-run" in after
    assert "401" in after
    assert ADMPipeline.from_pretrained(tmp_path / "my-run").unet.config.in_channels == 3
    assert set(hub.files("alice/my-run")) == {".gitattributes"}
    for path in (tmp_path / "my-run").rglob("*"):
        assert not path.is_file() or b"token-of-alice" not in path.read_bytes(), path
    assert "token-of-alice" not in said


@pytest.mark.parametrize("name, value", [("hub_model_id", "a/b"), ("hub_token", "hf_x"), ("hub_private_repo", True)])
def test_nothing_to_push(name, value):
    with pytest.raises(ValueError, match=f"`{name}` was given without `push_to_hub`"):
        TrainingArguments(**{name: value})


def test_no_name_of_a_repository():
    with pytest.raises(ValueError, match="alice/my model"):
        TrainingArguments(push_to_hub=True, hub_model_id="alice/my model")


@pytest.mark.parametrize("token", ["hf_secret\n", "hf_secret hf_secret", "hf_secr\u00e9t"])
def test_no_token(token):
    with pytest.raises(ValueError, match="`hub_token` holds other characters") as caught:
        TrainingArguments(push_to_hub=True, hub_token=token)
    assert "secr" not in str(caught.value)


def test_the_token_is_no_setting():
    arguments = TrainingArguments(push_to_hub=True, hub_token="hf_secret")
    assert "hf_secret" not in repr(arguments)
    settings = run_settings(arguments)
    assert settings == {name: value for name, value in vars(arguments).items() if name != "hub_token"}
