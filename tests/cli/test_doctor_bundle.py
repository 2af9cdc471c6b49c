"""The bundle: what is in it, and above all what is not."""

from __future__ import annotations

import base64
import zipfile
from pathlib import Path

import pytest

from balancer.cli import doctor_bundle
from balancer.config import load

CONFIG = """
server: {listen: ["127.0.0.1:11999"]}
auth:
  keys: [{name: webui, role: user, key: "${WEBUI_KEY}"}]
  keys_file: KEYS
backends:
  - {name: one, url: gpu1, auth: {type: bearer, token: token-of-gpu1}}
  - {name: two, url: gpu2, auth: {type: basic, username: joe, password: password-of-gpu2}}
  - {name: three, url: gpu3, headers: {X-Team: header-of-gpu3}}
"""
ENV = {
    "WEBUI_KEY": "key-of-webui-0123456789",
    "BALANCER_API_KEY": "key-of-admin-0123456789",
    "HTTP_PROXY": "http://joe:password-of-proxy@proxy:3128",
    "PATH": "/usr/bin",
}
SECRETS = (
    "token-of-gpu1",
    "password-of-gpu2",
    base64.b64encode(b"joe:password-of-gpu2").decode(),
    "header-of-gpu3",
    "key-of-webui-0123456789",
    "key-of-admin-0123456789",
    "key-of-class-0123456789",
    "password-of-proxy",
)


@pytest.fixture
def bundle(tmp_path: Path) -> dict[str, str]:
    """A bundle where everything that is secret was also said by somebody, by name of member."""
    keys = tmp_path / "keys"
    keys.write_text("class user key-of-class-0123456789\n")
    config = load(CONFIG.replace("KEYS", str(keys)), ENV)
    chatty = {"backends": [{"error": " ".join(SECRETS)}], "proxy": ENV["HTTP_PROXY"]}
    members = doctor_bundle.members(config, chatty, {"findings": list(SECRETS)}, {"version": "1"})
    secrets = [*doctor_bundle.secrets(config, ENV), "password-of-gpu2"]
    file = tmp_path / "bundle.zip"
    doctor_bundle.write(file, members, secrets)
    assert file.stat().st_mode & 0o077 == 0
    with zipfile.ZipFile(file) as opened:
        return {name: opened.read(name).decode() for name in opened.namelist()}


def test_what_is_in_it(bundle: dict[str, str]) -> None:
    """Configuration, status, findings, versions; and a word to who sends it."""
    assert set(bundle) == {
        "README.txt",
        "config.yaml",
        "origins.txt",
        "status.json",
        "doctor.json",
        "versions.json",
    }
    assert "127.0.0.1:11999" in bundle["config.yaml"]
    assert "http://gpu1:11434" in bundle["config.yaml"]


@pytest.mark.parametrize("secret", SECRETS)
def test_no_secret_is_in_it(bundle: dict[str, str], secret: str) -> None:
    """Wherever it stood."""
    assert [name for name, text in bundle.items() if secret in text] == []


def test_the_configuration_is_masked_without_knowing_the_secrets(tmp_path: Path) -> None:
    """Two nets: what is written masks by place, what is sent by content."""
    (tmp_path / "keys").write_text("")
    config = load(CONFIG.replace("KEYS", str(tmp_path / "keys")), ENV)
    told = doctor_bundle.members(config, None, {}, {})
    for secret in SECRETS:
        assert secret not in told["config.yaml"] + told["origins.txt"]


def test_short_words_are_no_secrets(tmp_path: Path) -> None:
    """Masking them would leave nothing to read."""
    doctor_bundle.write(tmp_path / "a.zip", {"a.txt": "a blue sky"}, ["blue"])
    with zipfile.ZipFile(tmp_path / "a.zip") as opened:
        assert opened.read("a.txt") == b"a blue sky"


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    """Not even by accident between looking and writing."""
    file = tmp_path / "a.zip"
    file.write_text("mine")
    with pytest.raises(FileExistsError):
        doctor_bundle.write(file, {}, [])
    assert file.read_text() == "mine"


def test_a_faulty_configuration_still_makes_a_bundle(tmp_path: Path) -> None:
    """That is when people need one; the keys of the environment are known all the same."""
    key = tmp_path / "key"
    key.write_text("key-of-file-0123456789\n")
    env = {**ENV, "BALANCER_API_KEY_FILE": str(key)}
    assert set(doctor_bundle.members(None, None, {}, {})) == {"doctor.json", "versions.json"}
    found = doctor_bundle.secrets(None, env)
    assert {"key-of-admin-0123456789", "key-of-file-0123456789"} <= set(found)
    assert "/usr/bin" not in found
