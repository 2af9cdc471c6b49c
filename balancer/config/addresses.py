"""Addresses as users write them: of backends, of our own listeners, of networks."""

import ipaddress
import re
from dataclasses import dataclass

from .problems import shown

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

LOOPBACK: tuple[Network, ...] = (
    ipaddress.ip_network("127.0.0.0/8"),
    ipaddress.ip_network("::1/128"),
)
EVERYWHERE: tuple[Network, ...] = (
    ipaddress.ip_network("0.0.0.0/0"),
    ipaddress.ip_network("::/0"),
)
DEFAULT_LISTEN_PORT = 11435

_OLLAMA_PORT = 11434
_SCHEME_PORTS = {"http": 80, "https": 443}
_SELF_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_METADATA = frozenset(
    {"100.100.100.200", "fd00:ec2::254", "metadata", "metadata.google.internal"}
)  # 169.254.169.254 is link-local
_HOST = re.compile(r"(?=.{1,253}\Z)[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_]([a-z0-9_-]{0,62}))*\.?")
_ORIGIN = re.compile(r"([a-z*][a-z0-9+.*-]*://|\*)[^\s/?#@]+", re.IGNORECASE | re.ASCII)
_NUMERIC_END = re.compile(r"(.*\.)?(0x[0-9a-f]*|[0-9]+)\.?")
_FD_NAME = re.compile(r"fd:[A-Za-z0-9._-]{1,255}")  # what the balancer's own socket unit may say
_URL_PATH = re.compile(r"(/[A-Za-z0-9._~!$&'()*+,;=:%-]+)*")


@dataclass(frozen=True, slots=True)
class BackendUrl:
    """
    Where a backend is called.

    *path* has no trailing slash. *warning* says what was wrong with the text
    and replaced, as Ollama does it for ports.
    """

    scheme: str
    host: str
    port: int
    path: str = ""
    warning: str | None = None

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}{self.path}"

    @property
    def authority(self) -> str:
        """Host and port, as a Host header has them."""
        return _join(self.host, self.port)

    @property
    def is_provider(self) -> bool:
        """Whether this is ollama.com itself."""
        return self.host.removesuffix(".") == "ollama.com"

    def same_place(self) -> tuple[str, str, int, str]:
        """Return a key that is equal for two spellings of one address."""
        host = self.host.removesuffix(".")
        return self.scheme, "127.0.0.1" if host in _SELF_NAMES else host, self.port, self.path


@dataclass(frozen=True, slots=True)
class Listen:
    """
    An address of ours: *host* and *port*, or the *path* of a unix socket, or the name under
    which systemd hands sockets over (*fd*).

    An empty *host* is every interface; port 0 lets the system choose.
    """

    host: str
    port: int
    path: str | None = None
    fd: str | None = None

    def __str__(self) -> str:
        if self.fd:
            return f"fd:{self.fd}"
        return f"unix:{self.path}" if self.path else _join(self.host, self.port)

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it; of a socket handed over we do not know."""
        if self.path or self.host == "localhost":
            return True
        address = _address(self.host)
        return address is not None and address.is_loopback

    def is_reached_by(self, url: BackendUrl) -> bool:
        """Whether calls to *url* would come back to us, judged by the text alone."""
        if self.path or not self.port or self.port != url.port:
            return False
        here, there = self.host, url.same_place()[1]
        address = _address(here)
        if not here or (address is not None and address.is_unspecified):
            target = _address(there)
            return target is not None and target.is_loopback
        return ("127.0.0.1" if here in _SELF_NAMES else here) == there


def parse_ollama_host(text: str) -> BackendUrl:
    """
    Read an address the way Ollama reads ``OLLAMA_HOST``.

    A bare host means port 11434, ``http://h`` port 80, ``https://h`` port 443.
    A path is kept, quotes are trimmed, a bad port gives the default and a
    warning. An address of no interface (``:1234``, ``0.0.0.0``) is loopback,
    since one cannot call it otherwise.

    Raises:
        ValueError: Not http(s), carries a user name, or is nothing a backend may be.

    Source:
        ollama/ollama, envconfig/config.go.
    """
    text = text.strip().strip("\"'").strip()
    if "@" in text:  # said first and without the text: what stands before it is a secret
        raise ValueError(
            "an address must not contain a user name or password. "
            'Write them into the backend\'s "auth" block instead.'
        )
    if "?" in text or "#" in text:
        raise ValueError(
            "an address has neither query nor fragment: leave out everything from ? or # on."
        )
    scheme, separator, rest = text.partition("://")
    if not separator:
        scheme, rest = ("https", "ollama.com:443") if text == "ollama.com" else ("http", text)
    default = _SCHEME_PORTS.get(scheme.lower(), _OLLAMA_PORT) if separator else _OLLAMA_PORT
    if scheme.lower() not in _SCHEME_PORTS:
        raise ValueError(f"{shown(scheme)} is not a scheme we speak. Write http:// or https://.")
    authority, _, path = rest.partition("/")
    host, port_text = _split(authority)
    port, warning = default, None
    if port_text is not None:
        port, warning = _port(port_text, default)
    return BackendUrl(scheme.lower(), _backend_host(host), port, _path(path), warning)


def parse_listen(text: str) -> Listen:
    """
    Read ``host:port``, ``host`` (port 11435), ``:port`` (every interface), ``unix:/path`` or
    ``fd:NAME``.

    Raises:
        ValueError: None of these.
    """
    text = text.strip()
    if text.startswith("unix:"):
        if not text.startswith("unix:/") or "\0" in text:
            raise ValueError(f"{shown(text)} needs an absolute path: unix:/run/balancer.sock.")
        return Listen("", 0, text.removeprefix("unix:"))
    if text.startswith("fd:"):
        if not _FD_NAME.fullmatch(text):
            raise ValueError(f"{shown(text)} needs the FileDescriptorName= of a socket: fd:api.")
        return Listen("", 0, fd=text.removeprefix("fd:"))
    if "://" in text:
        raise ValueError(f"{shown(text)} is a url. Write host:port.")
    if text.isdecimal():
        raise ValueError(f"{shown(text)} is a port alone. Write 127.0.0.1:{text}.")
    host, port_text = _split(text)
    port = DEFAULT_LISTEN_PORT
    if port_text is not None:
        port, warning = _port(port_text, 0)
        if warning:
            raise ValueError(warning.partition(";")[0] + ".")
    elif not host:
        raise ValueError("is empty. Write host:port.")
    return Listen("" if host == "*" else _host(host) if host else "", port)


def parse_network(text: str) -> Network:
    """
    Read an address or a network in CIDR form.

    Raises:
        ValueError: Neither, or bits beyond the prefix are set.
    """
    try:
        return ipaddress.ip_network(text.strip())
    except ValueError:
        pass
    try:
        meant = ipaddress.ip_network(text.strip(), strict=False)
    except ValueError:
        raise ValueError(
            f"{shown(text)} is not a network. Write 192.168.1.0/24, fd00::/8 or one address."
        ) from None
    raise ValueError(f"{shown(text)} has bits set beyond its prefix. Write {meant}.")


def parse_origin(text: str) -> str:
    """
    Read the origin of a web page, as a browser sends it: ``https://chat.example.org[:8443]``.

    One ``*`` in it stands for anything, and alone for every page.

    Raises:
        ValueError: Anything else.
    """
    text = text.strip().removesuffix("/")
    if text != "*" and not (_ORIGIN.fullmatch(text) and text.count("*") < 2):
        raise ValueError(
            f"{shown(text)} is not the origin of a page. Write scheme://host[:port] without a "
            'path; one * stands for anything, "*" alone for every page.'
        )
    return text.lower()


def parse_host_name(text: str) -> str:
    """
    Read a bare host name or IP, without scheme and port.

    Raises:
        ValueError: Anything else.
    """
    text = text.strip()
    if _address(text.strip("[]")) is None and ("://" in text or ":" in text or "/" in text):
        raise ValueError(f"{shown(text)} is not a bare host name. Leave out scheme, port and path.")
    return _host(text.strip("[]"))


def _split(authority: str) -> tuple[str, str | None]:
    """Part host from port as Go's ``net.SplitHostPort`` does; no port is None."""
    if _address(authority.strip("[]")) is not None:
        return authority.strip("[]"), None
    if authority.startswith("["):
        inside, bracket, tail = authority[1:].partition("]")
        if bracket and tail.startswith(":"):
            return inside, tail[1:]
        return authority, None
    host, colon, port = authority.rpartition(":")
    return (host, port) if colon else (authority, None)


def _port(text: str, default: int) -> tuple[int, str | None]:
    if re.fullmatch(r"[0-9]{1,9}", text) and int(text) <= 65535:
        return int(text), None
    return default, f"{shown(text)} is not a port (0 to 65535); using {default}"


def _path(text: str) -> str:
    path = f"/{text}".rstrip("/")
    if not _URL_PATH.fullmatch(path) or {".", ".."} & set(path.split("/")):
        raise ValueError(f"{shown(path)} is not a plain path such as /ollama.")
    return path


def _host(text: str) -> str:
    address = _address(text)
    if address is not None:
        if "%" in str(address):
            raise ValueError(f"{shown(text)}: addresses with a zone are not supported.")
        return str(address)
    name = text.lower()
    if not name.isascii():
        try:
            name = name.encode("idna").decode()
        except UnicodeError:
            raise ValueError(f"{shown(text)} is not a host name.") from None
    # The system would read "2852039166" or "0x7f.1" as an IPv4 address.
    if not _HOST.fullmatch(name) or _NUMERIC_END.fullmatch(name):
        raise ValueError(f"{shown(text)} is not a host name or an IP address.")
    return name


def _backend_host(text: str) -> str:
    host = _host(text) if text else "127.0.0.1"
    if host.removesuffix(".") in _METADATA:
        raise ValueError(f"{host} is a cloud metadata service, not a backend.")
    address = _address(host)
    if address is None:
        return host
    if address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "::1"
    for kind in ("link_local", "multicast"):
        if getattr(address, f"is_{kind}"):
            raise ValueError(f"{host} is a {kind.replace('_', '-')} address, not a backend.")
    if address.is_reserved and not address.is_loopback:
        raise ValueError(f"{host} is a reserved address, not a backend.")
    return host


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        return address.ipv4_mapped
    return address


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
