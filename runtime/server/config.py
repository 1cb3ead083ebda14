"""Everything a server is told when it starts, as data."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Limits:
    """Most that one request may ask for; more is a 400 (413 for the body)."""

    body_bytes: int = 32 << 20
    choices: int = 32
    prompts: int = 64
    stops: int = 32
    stop_characters: int = 1024
    logit_bias: int = 1024
    tools: int = 512
    schema_bytes: int = 256 << 10
    schema_depth: int = 32


@dataclass(frozen=True)
class ServerConfig:
    """`request_timeout`: seconds from arrival to the last token, None for no end. `drain_timeout`: seconds that running
    requests get to end after SIGTERM. `max_queued`: requests that may wait for a slot."""

    model_names: tuple[str, ...] = ("model",)
    accept_any_model: bool = False
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    cors_origins: tuple[str, ...] = ()
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    request_timeout: float | None = None
    drain_timeout: float = 30.0
    max_queued: int = 256
    limits: Limits = field(default_factory=Limits)

    @property
    def model_name(self) -> str:
        """The name that answers carry when the request's own is not kept."""
        return self.model_names[0]
