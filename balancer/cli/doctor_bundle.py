"""A file to send along with a question: what is configured and seen, without what is secret."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from balancer.config import Config, effective, to_yaml

SHORTEST: Final = 6  # a shorter secret would take half of the text with it
MASK: Final = "***"
_TELLING: Final = frozenset({"KEY", "KEYS", "TOKEN", "SECRET", "PASSWORD"})
_PASSWORD: Final = re.compile(r"://[^/@:\s]*:([^/@\s]+)@")
README: Final = """\
Made by `ollama-balancer doctor --bundle`. Secrets are masked and prompts are never in it; names
and addresses of your hosts and models are. Read it before you send it.
"""


def write(file: Path, members: Mapping[str, str], secrets: Iterable[str]) -> None:
    """
    Write the bundle, for its owner's eyes; every secret is masked once more, wherever it stands.

    Raises:
        FileExistsError: The file is there already.
    """
    known = sorted({secret for secret in secrets if len(secret) >= SHORTEST}, key=len, reverse=True)
    # Modes above 0600 are for the user to give.
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with (
        os.fdopen(descriptor, "wb") as stream,
        zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as bundle,
    ):
        for name, text in {"README.txt": README, **members}.items():
            for secret in known:
                text = text.replace(secret, MASK)
            bundle.writestr(name, text)


def members(
    config: Config | None,
    status: Mapping[str, Any] | None,
    doctor: Mapping[str, Any],
    versions: Mapping[str, Any],
) -> dict[str, str]:
    """What is put in, by name."""
    told = {"doctor.json": _json(doctor), "versions.json": _json(versions)}
    if status is not None:
        told["status.json"] = _json(status)
    if config is not None:
        told["config.yaml"] = to_yaml(config)
        told["origins.txt"] = "\n".join("\t".join(setting) for setting in effective(config))
    return told


def secrets(config: Config | None, env: Mapping[str, str]) -> list[str]:
    """All that must not be told: credentials of backends, keys in the environment and in files."""
    found = [value for name, value in env.items() if _is_secret(name)]
    found += [password for value in env.values() for password in _PASSWORD.findall(value)]
    for name in env:
        if name.endswith("_KEY_FILE") and env[name]:
            found += _lines(env[name])
    if config is None:
        return found
    for spec in config.backends:
        found += [value for _, value in spec.headers]
        for _, secret in spec.auth_headers:
            found += [secret.reveal(), secret.reveal().partition(" ")[2]]
    if config.auth.keys_file:
        found += [word for line in _lines(config.auth.keys_file) for word in line.split()[2:]]
    return found


def _is_secret(name: str) -> bool:
    words = name.upper().split("_")
    if words[-1] in ("FILE", "PATH"):
        return False
    return bool(_TELLING & set(words))


def _lines(file: str) -> list[str]:
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return []
    return [line.strip() for line in text.splitlines()]


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
