"""Which URLs webhooks may go to, and which addresses may be connected to: protection against requests into the
network that this server stands in. Pure; names are resolved by `adapters/webhooks/`, which asks here for each address.

A URL is judged twice: when it is given, by what can be seen in it, and at every attempt, by the addresses that its
name has at that moment. WEBHOOK_ALLOWED_HOSTS lists what may be reached although it is not public.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TypeAlias
from urllib.parse import SplitResult, urlsplit

from vllm_batch_dagster.core.creation import MAX_METADATA_VALUE, check_text
from vllm_batch_dagster.core.errors import InvalidInput

Address: TypeAlias = IPv4Address | IPv6Address
Network: TypeAlias = IPv4Network | IPv6Network

UNACCEPTABLE_URL = "invalid_webhook_url"
SETTING = "WEBHOOK_ALLOWED_HOSTS"

_GLOBAL_UNICAST = IPv6Network("2000::/3")  # all that is given out to the public internet
_TRANSLATED = IPv6Network("64:ff9b::/96")  # NAT64: the last 32 bits are the IPv4 address that is reached
# Inside 2000::/3 and yet not the public internet: Teredo and other special purposes, documentation, 6to4 (whose
# relays reach any IPv4 address).
_SPECIAL = tuple(map(IPv6Network, ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")))
_RELAYS = IPv4Network("192.88.99.0/24")  # of 6to4


@dataclass(frozen=True, slots=True)
class AllowedHosts:
    """Receivers that are allowed although they are not on the public internet, or speak plain HTTP."""

    names: frozenset[str] = frozenset()
    networks: tuple[Network, ...] = ()

    def has_name(self, host: str) -> bool:
        return _plain(host) in self.names

    def has_address(self, address: Address) -> bool:
        found = _reached(address)
        return any(found in network for network in self.networks)

    def has(self, host: str) -> bool:
        """True for a listed name, and for an address that is written out and lies in a listed network."""
        address = read_address(host)
        return self.has_name(host) or (address is not None and self.has_address(address))


NO_HOSTS = AllowedHosts()


def read_allowed_hosts(text: str) -> AllowedHosts:
    """Read the setting: host names, addresses and CIDR networks, separated by commas. Raises ValueError."""
    names, networks = set(), list[Network]()
    for entry in filter(None, (part.strip() for part in text.split(","))):
        bare = entry.removeprefix("[").removesuffix("]")
        if "/" in entry or read_address(bare) is not None:
            networks.append(ip_network(bare, strict=False))
        elif _is_name(bare):
            names.add(_plain(bare))
        else:
            raise ValueError(f"'{entry}' is no host name, address or network such as 10.0.0.0/8")
    return AllowedHosts(frozenset(names), tuple(networks))


def read_webhook_url(url: str, param: str, hosts: AllowedHosts = NO_HOSTS) -> str:
    """Return a URL that may be a target. Raises InvalidInput, which says why it may not.

    https, and http only for allowed hosts. A host that is written as an address must be a public or an allowed one.
    """
    check_text(param, url, MAX_METADATA_VALUE)
    parts = _split(url, param)
    host = parts.hostname or ""
    if parts.scheme not in ("https", "http"):
        raise _refuse(param, "it must begin with https://")
    if parts.username is not None or parts.password is not None:
        raise _refuse(param, "it must not carry a user name or password; deliveries are signed instead")
    if not _is_host(host):
        raise _refuse(param, "its host is neither a name nor an address in the usual notation")
    if parts.scheme == "http" and not hosts.has(host):
        raise _refuse(param, f"it must begin with https:// (http is for hosts that {SETTING} lists)")
    address = read_address(host)
    if address is not None and not is_reachable(address, host, hosts):
        raise _refuse(param, f"{host} is not on the public internet and not listed in {SETTING}")
    return url


def is_reachable(address: Address, host: str, hosts: AllowedHosts = NO_HOSTS) -> bool:
    """True when a connection to `address`, which `host` has been resolved to, is allowed."""
    return hosts.has_name(host) or hosts.has_address(address) or is_public(address)


def is_public(address: Address) -> bool:
    """True for an address on the public internet, judged by the IPv4 address inside where it has one."""
    reached = _reached(address)
    if isinstance(reached, IPv4Address):
        return reached.is_global and not reached.is_multicast and reached not in _RELAYS
    return reached in _GLOBAL_UNICAST and reached.is_global and not any(reached in network for network in _SPECIAL)


def read_address(host: str) -> Address | None:
    """Return the address that `host` writes out in the usual notation, None for anything else."""
    try:
        return ip_address(host)
    except ValueError:
        return None


def _reached(address: Address) -> Address:
    """The IPv4 address that a packet to an IPv4-mapped or NAT64 address goes to; else the address itself."""
    if isinstance(address, IPv6Address) and (address.ipv4_mapped is not None or address in _TRANSLATED):
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def _split(url: str, param: str) -> SplitResult:
    # urlsplit drops tabs and line ends and takes spaces: whoever calls the URL later may not.
    if not url.isascii() or not url.isprintable() or any(letter in ' \\"<>^`{|}' for letter in url):
        raise _refuse(param, "write it in ASCII without spaces; encode other characters as %XX")
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises for one that is none
    except ValueError as fault:
        raise _refuse(param, f"it cannot be read: {fault}") from fault
    if parts.port == 0:
        raise _refuse(param, "port 0 cannot be called")
    return parts


def _is_host(host: str) -> bool:
    # An address with a zone (fe80::1%eth0) names an interface of this machine.
    return "%" not in host and (read_address(host) is not None or _is_name(host))


def _is_name(host: str) -> bool:
    """False also for what systems read as an IPv4 address in another notation: 2130706433, 0x7f.1, 0177.0.0.1."""
    labels = _plain(host).split(".")
    last = labels[-1]
    is_number = last.isdecimal() or last.startswith("0x")
    return not is_number and all(map(_is_label, labels)) and len(host) <= 253


def _is_label(label: str) -> bool:
    letters: Iterable[str] = label.replace("-", "").replace("_", "")
    return 0 < len(label) <= 63 and label.isascii() and all(letter.isalnum() for letter in letters)


def _plain(host: str) -> str:
    return host.lower().removesuffix(".")


def _refuse(param: str, reason: str) -> InvalidInput:
    return InvalidInput(
        f"Invalid '{param}': this URL cannot receive webhooks: {reason}.", param=param, code=UNACCEPTABLE_URL
    )
