"""Where a request comes from: what trusted proxies in front of the server say of it."""

from __future__ import annotations

from collections.abc import Collection
from ipaddress import IPv6Address, ip_address, ip_network

from starlette.datastructures import Headers
from starlette.types import Scope


class Proxies:
    """Proxies whose word counts, by their addresses."""

    def __init__(self, addresses: Collection[str]) -> None:
        """Take the addresses.

        Args:
            addresses: addresses and networks.
        """
        self._networks = [ip_network(address) for address in addresses]

    def trusts(self, address: str) -> bool:
        """Whether a proxy is at an address."""
        try:
            parsed = ip_address(address)
        except ValueError:
            return False
        plain = (parsed.ipv4_mapped if isinstance(parsed, IPv6Address) else None) or parsed
        return any(plain in network for network in self._networks)

    def origin(self, scope: Scope, headers: Headers) -> tuple[str, str]:
        """Address and scheme of the client that a trusted proxy speaks for.

        ``X-Forwarded-For`` grows to the right, and what a client itself wrote there stands on the left: the last
        address that is no proxy's counts.
        """
        address, scheme = peer(scope), scope.get("scheme", "http")
        for part in reversed(",".join(headers.getlist("x-forwarded-for")).split(",")):
            try:
                address = str(ip_address(part.strip()))
            except ValueError:
                break
            if not self.trusts(address):
                break
        said = headers.get("x-forwarded-proto", "").rpartition(",")[2].strip().lower()
        return address, said if said in ("http", "https") else scheme


def peer(scope: Scope) -> str:
    """The address at the other end of the connection; empty where there is none."""
    return str(scope["client"][0]) if scope.get("client") else ""
