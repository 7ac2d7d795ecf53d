"""Settings that every service has, and what follows from them: certificates, secrets, access. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from overfill.api.keys import BadKeyFile, KeyRing
from overfill.rpc.access import METRICS_ROUTES, MIN_SECRET, WORKER_RPCS, AccessPolicy, Rule
from overfill.rpc.addresses import is_loopback
from overfill.rpc.tls import ClientTls, Credentials, ServerTls
from overfill.settings.values import LogLevel, PairName, Port
from overfill.telemetry.logs import LogFormat


class CommonSettings(BaseSettings):
    """Settings of every service."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        env_ignore_empty=True,
    )
    program: ClassVar[str]
    section: ClassVar[str]
    """Of a file."""
    rpcs: ClassVar[Mapping[str, Rule]] = WORKER_RPCS
    """Who may call what here."""

    config: Path | None = Field(
        None, description="YAML or TOML file of settings, for what no flag and no variable says; see `overfill config`"
    )
    pair: PairName = Field(
        description="a named pair (default, fast, identity), prepared in the cache when it is not there, or the folder "
        "of a pair (./default for one of such a name)"
    )
    host: str = Field(
        "127.0.0.1", description="address to listen on; anything but loopback needs --tls-cert, --tls-key and --tls-ca"
    )
    port: Port = Field(0, description="port to listen on; 0 picks a free one")
    grace_period: float = Field(30.0, ge=0, description="seconds for running requests to finish at shutdown")
    tls_cert: Path | None = Field(None, description="PEM certificate of this process")
    tls_key: Path | None = Field(None, description="PEM private key of --tls-cert")
    tls_ca: Path | None = Field(None, description="PEM certificates that peers are checked against")
    tls_name: str = Field(
        "", description="name that all other processes' certificates bear, whatever their address; empty: their host's"
    )
    api_keys: Path | None = Field(
        None,
        description="file of API keys (`overfill keys create`) that clients must show; by default none is wanted; "
        "on workers for /metrics only",
    )
    stack_secret: Path | None = Field(
        None,
        description="file with the secret that processes of the stack show each other; without certificates of both "
        "sides, where there are API keys, it is what lets workers join",
    )
    log_level: LogLevel = Field("info", description="how much is logged to stderr")
    log_format: LogFormat = Field("text", description="lines for people, or one JSON object per line")
    log_requests: Literal["on", "off"] = Field(
        "off", description="whether a line is logged at the end of each request; prompts and answers never are"
    )
    otlp_traces_endpoint: str = Field(
        "",
        pattern=r"^(https?://.+)?$",
        description="where traces are sent over OTLP/gRPC, such as http://127.0.0.1:4317; by default what "
        "OTEL_EXPORTER_OTLP_ENDPOINT says, and nowhere without it",
    )
    metrics_port: Port | Literal["off"] = Field(
        0, description="port of /metrics, for Prometheus; 0 picks a free one, which `overfill status` shows; or off"
    )
    metrics_host: str = Field(
        "127.0.0.1", description="address of /metrics; anything but loopback needs --tls-cert, --tls-key and --tls-ca"
    )

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key go together: give both, or neither")
        certain = self.tls_cert is not None and self.tls_ca is not None
        if self.metrics_port != "off" and not certain and not is_loopback(self.metrics_host):
            raise ValueError(
                f"--metrics-host {self.metrics_host} is open to other machines: give --tls-cert, --tls-key and "
                "--tls-ca, which signs the scraper's certificate, or keep --metrics-host 127.0.0.1"
            )
        # Without --tls-ca nobody has to show a certificate: anyone could join as a worker, or drain the stack. API
        # keys guard neither of these.
        if not certain and not is_loopback(self.host):
            raise ValueError(
                f"--host {self.host} is open to other machines, and without certificates of both sides to anyone "
                "there: give --tls-cert, --tls-key and --tls-ca (which signed the certificates of all other "
                "processes), or keep --host 127.0.0.1"
            )
        return self

    def server_tls(self) -> ServerTls | None:
        """Certificates to serve with; with ``tls_ca``, clients must show one that it signed. None: in the clear."""
        if self.tls_cert is None or self.tls_key is None:
            return None
        return ServerTls(self.tls_cert, self.tls_key, self.tls_ca)

    def client_tls(self) -> ClientTls | None:
        """Certificates for talking to the other processes of the stack; None: in the clear."""
        if self.tls_cert is None and self.tls_ca is None:
            return None
        return ClientTls(self.tls_ca, self.tls_cert, self.tls_key, self.tls_name)

    def credentials(self) -> Credentials | None:
        """What this process shows to the others of the stack; None: nothing, and it talks in the clear."""
        tls, secret = self.client_tls(), self._secret()
        return Credentials(tls, secret) if tls is not None or secret else None

    def access(self) -> AccessPolicy:
        """In front of the RPCs. Raises BadKeyFile."""
        return AccessPolicy(self.rpcs, None, self._secret())

    def metrics_access(self, keys: KeyRing | None = None) -> AccessPolicy:
        """In front of the port of metrics. Raises BadKeyFile."""
        return AccessPolicy(
            METRICS_ROUTES, None if (keys := keys or self.key_ring()) is None else keys.find, self._secret()
        )

    def key_ring(self) -> KeyRing | None:
        """The API keys. Raises BadKeyFile."""
        return None if self.api_keys is None else KeyRing(self.api_keys)

    def _secret(self) -> str:
        if self.stack_secret is None:
            return ""
        try:
            secret = self.stack_secret.read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise BadKeyFile(f"cannot read the stack's secret in {self.stack_secret}: {error}") from error
        if len(secret) < MIN_SECRET or not (secret.isascii() and secret.isprintable()):
            raise BadKeyFile(
                f"{self.stack_secret} holds no secret of {MIN_SECRET} printable characters or more; "
                "make one with `openssl rand -hex 32`"
            )
        return secret

    def trace_endpoint(self) -> str:
        """Where traces are sent; empty: nowhere."""
        return self.otlp_traces_endpoint or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")
