"""Exposure: who can reach the page, and the address, password, limits and hidden parts that follow from it.

By default only this machine reaches the page, without a password. With `--share` or an address other than loopback the
page generates a password, unless `--public` lets everyone in. A hosted page (Hugging Face Spaces) has no password.
Pages that others can reach have limits and hide files and paths.
"""

import argparse
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from lightx2v.config.request import MAX_FRAMES, MAX_PROMPT, MAX_SIDE, Request
from lightx2v.errors import BadRequest, ConfigError
from lightx2v.server.command import is_loopback

MEGABYTE = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits on one visitor's requests. The defaults are the engine's own."""

    prompt: int = MAX_PROMPT
    area: int = MAX_SIDE * MAX_SIDE
    frames: int = MAX_FRAMES
    steps: int = 200
    queue: int = 50
    batch: int = 20
    """Jobs that one click may queue."""
    upload: int = 200 * MEGABYTE
    kept: int = 1000 * MEGABYTE
    """Bytes of one visitor's uploads that stay on the disk."""

    def check(self, request: Request) -> None:
        """Raises BadRequest, naming the limit, for a request that exceeds one."""
        for name in ("prompt", "negative_prompt"):
            if (got := len(getattr(request, name))) > self.prompt:
                raise BadRequest(f"{name} has {got} characters; this page allows {self.prompt}. Shorten it.")
        for name in ("frames", "steps"):
            if (got := getattr(request, name)) > (limit := getattr(self, name)):
                raise BadRequest(f"{name} is {got}; this page allows {limit}. Ask for {limit} or fewer.")
        if request.area > self.area:
            raise BadRequest(
                f"The size {request.width}x{request.height} is {request.area} pixels; this page allows {self.area}. "
                "Choose a smaller size."
            )


PUBLIC_LIMITS = Limits(
    prompt=2000, area=1280 * 720, frames=81, steps=50, queue=10, batch=4, upload=32 * MEGABYTE, kept=128 * MEGABYTE
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exposure:
    """`open_to_others`: other people can reach the page. `hosted`: it runs on Spaces."""

    host: str | None = "127.0.0.1"
    port: int | None = None
    share: bool = False
    open_to_others: bool = False
    hosted: bool = False
    zerogpu: bool = False
    user: str = ""
    password: str = field(default="", repr=False)
    limits: Limits = Limits()
    hosts: frozenset[str] | None = None
    """Accepted Host headers, None for any. On loopback they keep other sites out (DNS rebinding)."""

    @property
    def auth(self) -> tuple[str, str] | None:
        return (self.user, self.password) if self.password else None

    @property
    def shows_paths(self) -> bool:
        """Whether the page has LoRA paths, model files and the offload choice."""
        return not self.open_to_others


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `decide` reads."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    port = os.environ.get("GRADIO_SERVER_PORT") or None
    parser.add_argument("--port", type=int, default=port, help="port (default: the first free one from 7860)")
    share = "create a public link and print it with a user and password"
    parser.add_argument("--share", action="store_true", help=share)
    parser.add_argument("--public", action="store_true", help="let others in without a password")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="require these instead of a generated password")
    allow_host = "also accept this host name (behind a proxy)"
    parser.add_argument("--allow_host", action="append", default=[], metavar="NAME", help=allow_host)


def decide(args: argparse.Namespace, variables: Mapping[str, str]) -> Exposure:
    """The exposure from flags and environment; ConfigError if they contradict each other."""
    if variables.get("SPACE_ID"):
        zerogpu = variables.get("SPACES_ZERO_GPU", "").lower() in ("1", "true", "t")
        limits = replace(PUBLIC_LIMITS, batch=1) if zerogpu else PUBLIC_LIMITS
        return Exposure(host=None, open_to_others=True, hosted=True, zerogpu=zerogpu, limits=limits)
    if args.public and args.auth:
        raise ConfigError("--public means without a password, but --auth sets one. Use only one of the two.")
    here = is_loopback(args.host)
    exposure = Exposure(host=args.host, port=args.port, share=args.share)
    if args.auth:
        user, colon, password = args.auth.partition(":")
        if not (user and colon and password):
            raise ConfigError("--auth needs USER:PASSWORD, both non-empty and with a colon between them.")
        if not args.auth.isprintable():
            raise ConfigError(
                "--auth holds a character that cannot be printed, and a login form cannot take it; expected printable "
                "ones. Leave it out, and the page makes a password."
            )
        exposure = replace(exposure, user=user, password=password)
    if here and not args.share:
        if args.public:
            raise ConfigError(
                "--public needs --share or --host: other machines cannot reach 127.0.0.1. Add one of them."
            )
        names = {"127.0.0.1", "localhost", "[::1]", "::1", args.host.lower(), *(h.lower() for h in args.allow_host)}
        return replace(exposure, hosts=frozenset(names))
    exposure = replace(exposure, open_to_others=True, limits=PUBLIC_LIMITS)
    if not args.public and not exposure.password:
        exposure = replace(exposure, user="studio", password=secrets.token_urlsafe(12))
    return exposure


ADDRESS = "http://127.0.0.1:7860"
"""The page's address until it is launched."""
