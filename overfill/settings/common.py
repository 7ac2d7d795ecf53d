"""Settings of every service, and the certificates, secrets and access policies made from them. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Self

from pydantic import ByteSize, Field, model_validator

from overfill.api.keys import BadKeyFile, KeyRing
from overfill.process.permissions import refusal
from overfill.request.grammar_limits import GrammarLimits
from overfill.rpc.access import METRICS_ROUTES, MIN_SECRET, NAME, WORKER_RPCS, AccessPolicy, Role, Rule
from overfill.rpc.addresses import is_loopback
from overfill.rpc.tls import ClientTls, Credentials, ServerTls
from overfill.settings.reader import SettingsReader
from overfill.settings.values import Bytes, LogLevel, PairName, Port, PortOrOff, Revision, Url
from overfill.telemetry.logs import LogFormat


class CommonSettings(SettingsReader):
    """Settings of every service."""

    rpcs: ClassVar[Mapping[str, Rule]] = WORKER_RPCS
    """Access rules of this service's RPCs."""

    role: ClassVar[Role] = Role.WORKER
    """Role that this service's certificate must have."""

    config: Path | None = Field(
        None,
        description="YAML or TOML file of settings; flags and variables take precedence; see `overfill config`",
    )
    pair: PairName = Field(
        description="name of a pair (default, fast, identity), which is prepared on first use, or a pair's folder "
        "(./default for a folder called default)"
    )
    revision: Revision = Field(
        "",
        description="name of this state of the pair's weights, such as r1; workers of two revisions never exchange KV; "
        "by default a revision without a name",
    )
    host: str = Field(
        "127.0.0.1",
        description="address to listen on; any other than loopback requires --tls-cert, --tls-key and --tls-ca",
    )
    port: Port = Field(0, description="port to listen on; 0 picks a free one")
    grace_period: float = Field(30.0, ge=0, description="seconds that running requests have to finish at shutdown")
    tls_cert: Path | None = Field(None, description="PEM certificate of this process")
    tls_key: Path | None = Field(None, description="PEM private key of --tls-cert")
    tls_ca: Path | None = Field(
        None, description="PEM file of the CA certificates that must have signed the other processes' certificates"
    )
    tls_name: str = Field(
        "",
        description="DNS name in the certificates of all other processes; overfill stands for the name of each one's "
        "role, such as worker.role.overfill.internal; empty means the host of each address",
    )
    api_keys: Path | None = Field(
        None,
        description="file of API keys, of which clients must send one (`overfill keys create` makes it); by default no "
        "key is required; on workers for /metrics only",
    )
    stack_secret: Path | None = Field(
        None,
        description="file with a secret that the processes of the stack send each other; required with --api-keys "
        "unless --tls-ca is given, so that only the stack's workers can join",
    )
    grammar_memory: Bytes = Field(
        ByteSize(64 << 20),
        description="memory that a client's grammar may take, such as 64MiB; a request with a larger one is refused",
    )
    grammar_seconds: int = Field(
        2,
        ge=1,
        description="seconds of CPU time that a client's grammar may take; a request with a slower one is refused",
    )
    log_level: LogLevel = Field("info", description="lowest level of messages that are logged to stderr")
    log_format: LogFormat = Field("text", description="format of the log: text lines, or one JSON object per line")
    log_requests: bool = Field(False, description="log a line at the end of each request, without prompt and answer")
    otlp_traces_endpoint: Url = Field(
        "",
        description="URL to which traces are sent over OTLP/gRPC, such as http://127.0.0.1:4317; by default "
        "$OTEL_EXPORTER_OTLP_ENDPOINT; no traces without either",
    )
    metrics_port: PortOrOff = Field(
        0,
        description="port of /metrics for Prometheus; 0 picks a free port, shown by `overfill status`; off disables it",
    )
    metrics_host: str = Field(
        "127.0.0.1",
        description="address of /metrics; any other than loopback requires --tls-cert, --tls-key and --tls-ca",
    )
    probe_port: PortOrOff = Field(
        "off",
        description="port of /livez, /readyz and /startupz, for probes of Kubernetes or another supervisor; 0 picks a "
        "free one, which the log names; off disables them",
    )
    probe_host: str = Field(
        "127.0.0.1",
        description="address of the probes, which need no client certificate; any other than loopback requires "
        "--tls-cert and --tls-key",
    )

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key need each other: give both, or neither")
        certain = self.tls_cert is not None and self.tls_ca is not None
        if self.metrics_port != "off" and not certain and not is_loopback(self.metrics_host):
            raise ValueError(
                f"--metrics-host {self.metrics_host} is open to other machines: give --tls-cert, --tls-key and "
                "--tls-ca (the CA of the scraper's certificate), or keep --metrics-host 127.0.0.1"
            )
        if self.probe_port != "off" and self.tls_cert is None and not is_loopback(self.probe_host):
            raise ValueError(
                f"--probe-host {self.probe_host} is open to other machines: give --tls-cert and --tls-key, or keep "
                "--probe-host 127.0.0.1"
            )
        # Without --tls-ca, callers need no certificate, so anyone could join as a worker or drain the stack. API keys
        # do not protect against either.
        if not certain and not is_loopback(self.host):
            raise ValueError(
                f"--host {self.host} is open to other machines, so callers must be checked: give --tls-cert, --tls-key "
                "and --tls-ca (the CA of all other processes' certificates), or keep --host 127.0.0.1"
            )
        return self

    def server_tls(self) -> ServerTls | None:
        """Returns the certificates for serving; None serves without TLS. With ``tls_ca``, clients need one too."""
        if self.tls_cert is None or self.tls_key is None:
            return None
        return ServerTls(self.tls_cert, self.tls_key, self.tls_ca)

    def client_tls(self) -> ClientTls | None:
        """Returns the certificates for calling other processes of the stack; None calls without TLS."""
        if self.tls_cert is None and self.tls_ca is None:
            return None
        return ClientTls(self.tls_ca, self.tls_cert, self.tls_key, self.tls_name)

    def check_certificate(self, caller: ClientTls | None, host: str) -> None:
        """Raises TlsError unless a process with the files of ``caller`` accepts this one's certificate at ``host``."""
        if (server := self.server_tls()) is not None and caller is not None:
            server.check_name(caller, host, self.role)

    def grammar_limits(self) -> GrammarLimits:
        """Returns what a client's grammar may cost."""
        return GrammarLimits(self.grammar_memory, self.grammar_seconds)

    def credentials(self) -> Credentials | None:
        """Returns the credentials for calling other processes; None means no credentials and no TLS."""
        tls, secret = self.client_tls(), self._secret()
        return Credentials(tls, secret) if tls is not None or secret else None

    def access(self) -> AccessPolicy:
        """Returns the access policy of the RPCs. Raises BadKeyFile."""
        return AccessPolicy(self.rpcs, None, self._secret())

    def metrics_access(self, keys: KeyRing | None = None) -> AccessPolicy:
        """Returns the access policy of the metrics port. Raises BadKeyFile."""
        return AccessPolicy(
            METRICS_ROUTES, None if (keys := keys or self.key_ring()) is None else keys.find, self._secret()
        )

    def key_ring(self) -> KeyRing | None:
        """Returns the API keys; None if none are configured. Raises BadKeyFile."""
        return None if self.api_keys is None else KeyRing(self.api_keys)

    def check_files(self) -> None:
        """Reads certificates, keys and secret, so that a fault is found before a model is loaded.

        Raises:
            TlsError: a certificate cannot be read, or the own one lacks the service's role.
            BadKeyFile: the API keys or the secret cannot be read.
        """
        if (server := self.server_tls()) is not None:
            server.credentials()
        if (client := self.client_tls()) is not None:
            client.reloaded()
            if server is not None and client.name == NAME:
                server.check_name(ClientTls(self.tls_cert, name=NAME), NAME, self.role)  # trusted here, for its names
        self.metrics_access()

    def _secret(self) -> str:
        if self.stack_secret is None:
            return ""
        try:
            secret = self.stack_secret.read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise BadKeyFile(
                f"cannot read the stack's secret in {self.stack_secret}: {refusal(self.stack_secret) or error}"
            ) from error
        if len(secret) < MIN_SECRET or not (secret.isascii() and secret.isprintable()):
            raise BadKeyFile(
                f"{self.stack_secret}: the secret must have at least {MIN_SECRET} printable ASCII characters; "
                "make one with `openssl rand -hex 32`"
            )
        return secret

    def trace_endpoint(self) -> str:
        """Returns the URL to which traces are sent; empty disables traces."""
        return self.otlp_traces_endpoint or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")
