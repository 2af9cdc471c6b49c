"""What stands under the options in a command's help: examples, environment, exit codes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from balancer.cli.exits import MEANING, ExitCode

Rows = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Help:
    """
    Of one command.

    Args:
        examples: What to type after ``ollama-balancer``, and what it does.
        environment: Variables it reads.
        exits: Codes beside 0 and 2, and what they mean here, if not what they always mean.
    """

    examples: Rows
    environment: Rows = ()
    exits: tuple[tuple[ExitCode, str], ...] = ()

    def text(self) -> str:
        r"""Paragraphs that are not wrapped: each begins with ``\b``."""
        examples = tuple((f"ollama-balancer {args}".rstrip(), told) for args, told in self.examples)
        codes = [(ExitCode.OK, ""), *self.exits] if self.exits else []
        exits = tuple((str(int(code)), told or MEANING[code]) for code, told in codes)
        parts = (("Examples", examples), ("Environment", self.environment), ("Exit codes", exits))
        return "\n\n".join("\n".join(_section(head, rows)) for head, rows in parts if rows)


def _section(head: str, rows: Rows) -> Iterator[str]:
    yield "\b"
    yield f"{head}:"
    width = max(len(left) for left, _ in rows)
    for left, right in rows:
        yield f"  {left:{width}}  {right}".rstrip()


CONFIG: Final = ("BALANCER_CONFIG", "configuration file, as --config")
KEY: Final = ("BALANCER_API_KEY", "key with the role admin; also BALANCER_API_KEY_FILE")
ADMIN: Final = (KEY, CONFIG)
BAD_CONFIG: Final = (ExitCode.CONFIG, "")
FAILURE: Final = (ExitCode.FAILURE, "")
NO_BACKEND: Final = (ExitCode.NO_BACKEND, "")
NO_ADMIN: Final = (ExitCode.NO_ADMIN, "")

HELP: Final[Mapping[str, Help]] = {
    "serve": Help(
        (
            ("-b gpu1 -b gpu2:11434", "two hosts, on 127.0.0.1:11435"),
            ("serve -c /etc/ollama-balancer/config.yaml", "as the file says"),
            ("--listen 0.0.0.0:11435", "for the network, with a key"),
        ),
        (
            CONFIG,
            ("BALANCER_LISTEN", "where to listen, as --listen"),
            ("BALANCER_BACKENDS", "Ollama hosts, separated by commas"),
            ("BALANCER_API_KEY", "one key with the role admin; also BALANCER_API_KEY_FILE"),
            ("BALANCER_<SECTION>__<KEY>", "any other setting"),
        ),
        (BAD_CONFIG, (ExitCode.BIND, ""), (ExitCode.INTERRUPTED, "stopped twice, not drained")),
    ),
    "demo": Help(
        (("demo", "until Ctrl+C"), ("demo --hosts 5 --seconds 60", "more of it, for a minute")),
        exits=((ExitCode.FAILURE, "a call failed"), (ExitCode.BIND, "")),
    ),
    "sim": Help(
        (
            ("sim", "three hosts, from port 11440 on"),
            ("sim --hosts 2 --scenario flaky", "one of them comes and goes"),
        ),
        exits=((ExitCode.BIND, ""),),
    ),
    "status": Help(
        (
            ("status", "now"),
            ("status --watch", "again and again"),
            ("status --json --admin gpu-box:11435", "for scripts, from elsewhere"),
        ),
        ADMIN,
        ((ExitCode.FAILURE, "refused"), BAD_CONFIG, NO_BACKEND, NO_ADMIN),
    ),
    "version": Help((("version", ""), ("version --json", "with Python and libraries"))),
    "doctor": Help(
        (
            ("doctor", "hosts, models, this machine, and the balancer if one runs"),
            ("doctor -b gpu1 -b gpu2", "before there is a configuration"),
            ("doctor --bundle doctor.zip", "to send along with a question; secrets are masked"),
        ),
        (*ADMIN, ("OLLAMA_HOST, HTTP_PROXY, …", "what they say is judged, too")),
        (
            (ExitCode.FAILURE, "an error was found (warnings are none)"),
            BAD_CONFIG,
            (ExitCode.NO_BACKEND, "no host answers"),
            (ExitCode.NO_ADMIN, "no balancer at --admin"),
        ),
    ),
    "explain": Help(
        (
            ("explain llama3.2", "where a call would go now, and why not elsewhere"),
            ("explain qwen3:32b --num-ctx 32768", "with a context of its own"),
            ("explain llama3.2 --exclude gpu1", "and if gpu1 failed it?"),
            ("explain llama3.2 --call ID", "why it waits, or what was decided; ID: X-Request-Id"),
        ),
        ADMIN,
        ((ExitCode.FAILURE, "the call would be refused"), BAD_CONFIG, NO_ADMIN),
    ),
    "bench": Help(
        (
            ("bench", "a few short calls, directly and through the balancer, by turns"),
            ("bench llama3.2 -n 30 --seconds 180", "one model, more rounds"),
            ("bench llama3.2 --load --concurrency 8", "loaded if need be; then eight at once"),
        ),
        ADMIN,
        (
            (ExitCode.FAILURE, "a call failed, or nothing could be measured"),
            BAD_CONFIG,
            NO_BACKEND,
            NO_ADMIN,
        ),
    ),
    "backends": Help(
        (
            ("backends list", "state, switch, breaker of each"),
            ("backends drain gpu1 --wait", "before a restart of gpu1"),
            ("backends resume gpu1", "afterwards"),
        ),
        ADMIN,
        ((ExitCode.FAILURE, "no such backend, or refused"), BAD_CONFIG, NO_ADMIN),
    ),
    "backends list": Help(
        (("backends list", ""), ("backends list --json", "for scripts")),
        ADMIN,
        ((ExitCode.FAILURE, "refused"), BAD_CONFIG, NO_BACKEND, NO_ADMIN),
    ),
    "backends drain": Help(
        (
            ("backends drain gpu1", "nothing new goes there"),
            ("backends drain gpu1 --wait --timeout 10m", "and what runs has ended"),
        ),
        ADMIN,
        ((ExitCode.FAILURE, "no such backend, or not drained in time"), BAD_CONFIG, NO_ADMIN),
    ),
    "backends resume": Help(
        (("backends resume gpu1 gpu2", "both are used again"),),
        ADMIN,
        (FAILURE, BAD_CONFIG, NO_ADMIN),
    ),
    "backends disable": Help(
        (("backends disable gpu1", "until resume; no trials either"),),
        ADMIN,
        (FAILURE, BAD_CONFIG, NO_ADMIN),
    ),
    "backends reset": Help(
        (("backends reset gpu1", "its breaker is closed at once"),),
        ADMIN,
        (FAILURE, BAD_CONFIG, NO_ADMIN),
    ),
    "backends check": Help(
        (("backends check gpu1 gpu2", "now, not at the next interval"),),
        ADMIN,
        (
            (ExitCode.FAILURE, "a check failed, or no such backend"),
            BAD_CONFIG,
            (ExitCode.NO_BACKEND, "all failed"),
            NO_ADMIN,
        ),
    ),
    "key": Help(
        (
            ("key new webui", "a key for a client"),
            ("key list", "who has one"),
            ("key revoke webui --reload", "from now on it is none"),
        ),
        (CONFIG,),
        (FAILURE, (ExitCode.CONFIG, "the keys file has a faulty line")),
    ),
    "key new": Help(
        (
            ("key new webui", "shows the key, writes its hash into auth.keys_file"),
            ("key new ops --role admin --reload", "one that may steer, in force at once"),
            ('key new guest --models "llama3.2*" --expires 2027-12-31', "of few rights"),
        ),
        ADMIN,
        (
            (ExitCode.FAILURE, "the name is taken, or the file cannot be written"),
            (ExitCode.CONFIG, "the keys file has a faulty line, or --reload was rejected"),
            (ExitCode.NO_ADMIN, "with --reload: the key is made, but nobody took it over"),
        ),
    ),
    "key list": Help(
        (("key list", ""), ("key list --file keys.txt --json", "for scripts")),
        (CONFIG,),
        (FAILURE,),
    ),
    "key revoke": Help(
        (("key revoke webui --reload", "and the running balancer forgets it"),),
        ADMIN,
        ((ExitCode.FAILURE, "no such key, or the file cannot be written"), BAD_CONFIG, NO_ADMIN),
    ),
    "key hash": Help((("key hash < key.txt", "for auth.keys: hash"),)),
    "models": Help(
        (
            ("models list", "what is installed, and in memory"),
            ("models pull llama3.2", "to all backends that may have it"),
            ("models sync --dry-run", "what is missing where"),
        ),
        ADMIN,
        (FAILURE, BAD_CONFIG, NO_ADMIN),
    ),
    "models list": Help(
        (("models list", ""), ("models list --where", "a column for each backend")),
        ADMIN,
        ((ExitCode.FAILURE, "refused"), BAD_CONFIG, NO_ADMIN),
    ),
    "models pull": Help(
        (
            ("models pull llama3.2", "to all backends whose rules allow it"),
            ("models pull qwen3:32b --to gpu1,gpu2", "only to these"),
            ("models pull llama3.2 --update", "the newest version, also where it is"),
        ),
        ADMIN,
        ((ExitCode.FAILURE, "a backend failed; the others have it"), BAD_CONFIG, NO_ADMIN),
    ),
    "models warm": Help(
        (
            ("models warm llama3.2", "where the next call would go"),
            ("models warm llama3.2 --on gpu1 --on gpu2", "on both"),
        ),
        ADMIN,
        (FAILURE, BAD_CONFIG, NO_ADMIN),
    ),
    "models unload": Help(
        (("models unload llama3.2", "everywhere"), ("models unload --all", "all that is loaded")),
        ADMIN,
        (FAILURE, BAD_CONFIG, NO_ADMIN),
    ),
    "models sync": Help(
        (
            ("models sync --dry-run", "what would be pulled where"),
            ("models sync llama3.2", "one model, to all that lack it"),
        ),
        ADMIN,
        ((ExitCode.FAILURE, "something could not be pulled"), BAD_CONFIG, NO_ADMIN),
    ),
    "reload": Help(
        (("reload", "as SIGHUP does; waits for the verdict"),),
        ADMIN,
        ((ExitCode.FAILURE, "refused"), (ExitCode.CONFIG, "rejected, or faulty"), NO_ADMIN),
    ),
    "init": Help(
        (
            ("init -b gpu1 -b gpu2", "a short file with two hosts"),
            ("init --from-discovery", "with the hosts that are found from here"),
            ("init --full -o -", "every setting and its default, on the screen"),
        ),
        (("OLLAMA_HOST, OLLAMA_BASE_URLS", "where --from-discovery looks"),),
        ((ExitCode.FAILURE, "the file is there already, or cannot be written"),),
    ),
    "check": Help(
        (
            ("check", "the file that serve would read"),
            ("check config.yaml --contact", "that one, and do the hosts answer?"),
            ("check --contact --strict", "for scripts: nothing less than all well"),
        ),
        (CONFIG,),
        ((ExitCode.FAILURE, "with --strict: not all well"), BAD_CONFIG, NO_BACKEND),
    ),
    "connect": Help(
        (
            ("connect", "the clients"),
            ("connect open-webui", "settings of one"),
            ("connect codex --base-url http://gpu-box:11435 --key KEY", "from another machine"),
        ),
        ADMIN,
        (BAD_CONFIG,),
    ),
    "completion": Help(
        (
            ("completion bash", 'in ~/.bashrc: eval "$(ollama-balancer completion bash)"'),
            ("completion zsh", "in ~/.zshrc, after compinit: the same with zsh"),
            ("completion fish", "into ~/.config/fish/completions/ollama-balancer.fish"),
        )
    ),
    "config show": Help(
        (
            ("config show", "a file with everything in force"),
            ("config show --origin", "and where each value comes from"),
        ),
        (CONFIG, ("BALANCER_*", "counts as it would for serve")),
        (BAD_CONFIG,),
    ),
    "config schema": Help((("config schema > config.schema.json", "for editors"),)),
    "install": Help(
        (
            ("install --system --print", "look at the systemd unit first"),
            ("install --compose", "a compose file, here"),
            ("install --takeover", "how to get Ollama's port 11434"),
        ),
        exits=((ExitCode.FAILURE, "something cannot be written"),),
    ),
    "healthcheck": Help(
        (("healthcheck", "is it there?"), ("healthcheck --ready", "could a call be served?")),
        (("BALANCER_LISTEN", "where it listens"),),
        ((ExitCode.FAILURE, "it is there, but not well"), NO_ADMIN),
    ),
}


def attach(command: Any, path: str) -> None:
    """Put it under a command's help, and under those of a group's commands."""
    for name, inner in getattr(command, "commands", {}).items():
        attach(inner, f"{path} {name}")
    told = HELP.get(path)
    if told is not None and told.text() not in (command.epilog or ""):
        command.epilog = "\n\n".join(filter(None, (told.text(), command.epilog)))
