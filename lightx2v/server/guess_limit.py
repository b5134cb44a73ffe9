"""GuessLimit: how often passwords and keys may be guessed, through all doors of a program together.

A guess is a secret that was sent and is wrong. Each address may guess ten times at once and then ten times a minute,
all addresses together a hundred times and then once a second. An address is the one that the connection comes from:
a header such as X-Forwarded-For counts only from a proxy that FORWARDED_ALLOW_IPS names, where uvicorn has put the
client's address in its place. While the limit holds, the right password is refused, too, as it would end the guessing.

A secret of 128 bits cannot be guessed, so it needs no limit and stays usable while others are being guessed.
"""

import ipaddress
import math
import string

from .limits import RateLimit

STRONG_BITS = 128
WAIT_SECONDS = 60
TOO_MANY = (
    "Too many wrong passwords or keys have been sent. Wait a minute, check yours, and send the request again. "
    "A key of 128 bits is not affected; make one with: openssl rand -hex 16"
)


class GuessLimit:
    """Call `take` before comparing a secret, and `give_back` if it was right. Safe from any thread."""

    def __init__(self) -> None:
        self._each, self._all = RateLimit(10 / 60, 10), RateLimit(1, 100)

    def take(self, address: str) -> bool:
        """True if this address may try one more secret now."""
        place = _place(address)
        if not self._each.take(place):
            return False
        if self._all.take(""):
            return True
        self._each.give_back(place)
        return False

    def give_back(self, address: str) -> None:
        """Count the last secret of this address not as a guess."""
        self._each.give_back(_place(address))
        self._all.give_back("")


def is_strong(secret: str) -> bool:
    """Whether a secret has 128 bits: its length times the bits of each character, as if they were drawn at random.

    A character is drawn from 16 in a hexadecimal secret, else from the digits, the lower-case and the upper-case
    letters of which it has any, and its other characters. `openssl rand -hex 16` gives exactly 128 bits. What repeats
    itself or has fewer than eight different characters was not drawn at random.
    """
    different = set(secret)
    if len(different) < 8 or secret in (secret + secret)[1:-1]:
        return False
    kinds = (string.digits, string.ascii_lowercase, string.ascii_uppercase)
    size = sum(len(kind) for kind in kinds if different & set(kind)) + len(different - set("".join(kinds)))
    if any(different <= set(digits) for digits in ("0123456789abcdef", "0123456789ABCDEF")):
        size = min(size, 16)
    return len(secret) * math.log2(size) >= STRONG_BITS


def _place(address: str) -> str:
    """What counts as one address: of IPv6 the network, whose owner has all 2**64 addresses in it."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:  # a test client, or a socket that is no network's
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        return str(parsed.ipv4_mapped or ipaddress.IPv6Network((int(parsed), 64), strict=False))
    return str(parsed)
