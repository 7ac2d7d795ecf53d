"""Settings of the services: one frozen class each, with a field per setting. No torch.

``settings.reader`` says how a field becomes a flag, a variable and a key of a file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Self

from pydantic import ByteSize, Field, model_validator

from overfill.api.keys import KeyRing
from overfill.errors import InvalidRequest
from overfill.kv.spec import DTypeName, KvCacheDtype, Quantization
from overfill.request.names import CodecName, ToolCallParser
from overfill.request.params import MAX_STREAM_INTERVAL
from overfill.request.thinking import ReasoningParser
from overfill.routing.policies import DECODE_DEFAULT, PREFILL_DEFAULT, DecodePolicyName, PolicyName
from overfill.routing.tier import DEFAULT_TIER
from overfill.rpc.access import ROUTER_RPCS, AccessPolicy, Role
from overfill.rpc.addresses import is_loopback, is_wildcard
from overfill.rpc.constants import MAX_DATA_STREAMS, MAX_PENDING_RPCS, MAX_TRANSFER_TIME, SPARE_RPCS
from overfill.settings.common import CommonSettings
from overfill.settings.config_file import COMMON, BadConfigFile, ConfigFile, flag_name, read_config_file
from overfill.settings.tiers import (
    RevisionSpec,
    TierOrder,
    Tiers,
    TierSpec,
    check_tier_name,
    check_tiers,
    default_tier,
)
from overfill.settings.values import (
    Addresses,
    Bytes,
    Device,
    EngineArgs,
    EngineChoice,
    Folder,
    Name,
    Names,
    Origins,
    PairName,
    Port,
    PortOrOff,
    Revision,
)

STEP_TOKENS = 512
"""Maximum number of prompt tokens in a step of a worker that shares cores, because answers wait for it."""

TTFT_OBJECTIVE, ITL_OBJECTIVE = 2.0, 0.1  # defaults, in seconds


class ServiceConfig(CommonSettings):
    """Settings of one service of a stack."""

    @classmethod
    def read_file(cls, path: Path) -> ConfigFile:
        return read_checked(path)


class WorkerConfig(ServiceConfig):
    """Settings of every kind of worker."""

    routers: Addresses = Field(
        (),
        description="routers to join, separated by commas: HOST:PORT, dns:///NAME:PORT for all addresses of a name, or "
        "ray:///APPLICATION for all routers of an application on this machine's Ray cluster",
    )
    worker_id: Name = Field("", description="name of this worker; empty generates one")
    advertise: str = Field(
        "", description="HOST or HOST:PORT at which other processes reach this worker; empty means --host"
    )
    dtype: DTypeName | None = Field(
        None,
        description="data type of weights, activations and transferred KV; must be equal on all workers; by default "
        "bfloat16; without instructions for it float16 on a GPU, and float32 on a CPU",
    )
    device: Device = Field("auto", description="device to compute on: auto, cpu, cuda or cuda:N")
    threads: int = Field(
        1, ge=1, description="number of CPU threads, of each rank; the workers of a machine share its cores"
    )
    tensor_parallel_size: int = Field(
        1,
        ge=1,
        description="number of ranks: processes that each hold a share of every layer's heads and weights, and have a "
        "GPU each; more than 1 needs vLLM",
    )
    shared_cores: Path | None = Field(
        None,
        description="file through which the workers of one machine take turns at its cores, a step at a time; steps of "
        f"prompts then have at most {STEP_TOKENS} tokens; only on the CPU, with OverFill's engine; overfill up sets it",
    )
    engine: EngineChoice = Field(
        "auto",
        description="engine that runs the model: overfill or vllm, or mock, which computes nothing and plays scripts; "
        "auto is vllm on the first CUDA device, if it is installed and fits the model, and overfill otherwise; the "
        "workers of a stack may use different engines, except for mock",
    )
    engine_args: EngineArgs = Field(
        "",
        description="arguments of the engine itself, as a JSON object by name: of vLLM its EngineArgs that no other "
        "setting sets, such as '{\"enforce_eager\": true}'; of the mock engine its times and scripts",
    )
    block_size: int | None = Field(
        None, ge=1, description="tokens per KV block; by default 16, or what vLLM chooses for the device"
    )
    kv_memory: Bytes | None = Field(
        None,
        description="size of the KV cache, of each rank, such as 512MiB; by default as much as fits in memory, but at "
        "most 1GiB on a CPU",
    )
    gpu_share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of the GPU's memory that this worker may use, without --kv-memory; by default all of it; "
        "overfill up and Ray set it for workers that share a GPU",
    )
    max_model_len: int | None = Field(
        None, ge=2, description="maximum tokens of a prompt with its answer; by default the model's context length"
    )
    max_num_seqs: int = Field(64, ge=1, description="maximum number of sequences in one step")
    shm: bool = Field(
        True, description="exchange KV between workers of one host through shared memory instead of sockets"
    )
    prefix_cache: bool = Field(
        True, description="keep the KV of prompts, while memory allows, for later prompts with the same beginning"
    )
    kv_peers: bool = Field(
        True,
        description="take the KV of a prompt's beginning from another worker's cache where that is sooner than "
        "computing it, and lend cached KV to other workers",
    )
    max_transfer_time: float = Field(
        MAX_TRANSFER_TIME,
        gt=0,
        description="seconds within which a prompt's KV must be transferred once all of it is computed; slower "
        "transfers are given up, so that they do not hold KV blocks for ever",
    )
    step_timeout: float | None = Field(
        None,
        gt=0,
        description="seconds after which a step counts as stuck and the worker exits; its requests move to other "
        "workers; by default 60 on a GPU and with several ranks, where the first 100 steps may take 600, and no limit "
        "in one process on a CPU",
    )

    @property
    def max_rpcs(self) -> int:
        """Limit on concurrent RPCs.

        It allows every prompt one RPC and the maximum number of data streams, because the peer chooses how many to
        open. ``SPARE_RPCS`` come on top, so that a full worker still answers health checks and routers' streams.
        """
        return self.max_num_seqs * (1 + MAX_DATA_STREAMS) + SPARE_RPCS

    @model_validator(mode="after")
    def _check_ranks(self) -> Self:
        if self.tensor_parallel_size > 1 and self.engine in ("overfill", "mock"):
            raise ValueError(
                f"--tensor-parallel-size {self.tensor_parallel_size}: only vLLM has ranks; give --engine vllm in place "
                f"of {self.engine}, or --tensor-parallel-size 1"
            )
        return self

    @model_validator(mode="after")
    def _check_advertise(self) -> Self:
        if is_wildcard(re.sub(r"(?<=[^:]):\d+$", "", self.advertise) or self.host):
            raise ValueError(
                f"other processes cannot connect to {self.advertise or self.host}: "
                "give the host at which they reach this worker with --advertise"
            )
        return self


class PrefillingConfig(WorkerConfig):
    """Settings of the workers that run the full model: prefill workers and those with both stages."""

    kv_disk: Folder | None = Field(
        None,
        description="folder in which the worker keeps the KV of prompts for later prompts with the same beginning, "
        "also after a restart; only this user may enter it; the workers of a machine may share it; by default none",
    )
    kv_disk_size: Bytes = Field(
        ByteSize(50 << 30), description="with --kv-disk, maximum size of the folder; least recently used KV goes first"
    )
    kv_disk_bandwidth: Bytes = Field(
        ByteSize(1 << 30), description="with --kv-disk, maximum number of bytes that the worker writes per second"
    )

    @model_validator(mode="after")
    def _check_disk(self) -> Self:
        if self.kv_disk is not None and self.tensor_parallel_size > 1:
            raise ValueError(
                f"--kv-disk: with --tensor-parallel-size {self.tensor_parallel_size}, ranks have the KV, and none of "
                "them keeps it on disk: remove --kv-disk"
            )
        if self.kv_disk is not None and not self.prefix_cache:
            raise ValueError("--kv-disk extends the prefix cache: remove --no-prefix-cache, or --kv-disk")
        return self


class PrefillConfig(PrefillingConfig):
    """Prefill worker: runs the full model. Each flag is also a variable, such as OVERFILL_PREFILL_KV_MEMORY."""

    prefix = "OVERFILL_PREFILL_"
    program = "overfill-prefill"
    section = "prefill"

    max_num_batched_tokens: int = Field(2048, ge=1, description="maximum number of prompt tokens computed in one step")
    data_port: Port = Field(
        0,
        description="with --tensor-parallel-size above 1, port at which rank 0 serves its share of the KV; rank 1 has "
        "the next port, and so on; 0 picks free ones",
    )

    @model_validator(mode="after")
    def _check_data_port(self) -> Self:
        ports = range(self.data_port, self.data_port + self.tensor_parallel_size) if self.data_port else range(0)
        if ports and ports[-1] > 65535:
            raise ValueError(
                f"--data-port {self.data_port}: rank {len(ports) - 1} would have port {ports[-1]}, above 65535: give a "
                "smaller one"
            )
        others = {"--port": self.port, "--metrics-port": self.metrics_port, "--probe-port": self.probe_port}
        for flag, port in others.items():
            if port in ports:
                raise ValueError(
                    f"--data-port {self.data_port}: the ranks have the ports up to {ports[-1]}, and {flag} is {port}: "
                    "give another one"
                )
        return self


class DecodeConfig(WorkerConfig):
    """Decode worker: runs the decoder. Each flag is also a variable, such as OVERFILL_DECODE_KV_MEMORY."""

    prefix = "OVERFILL_DECODE_"
    program = "overfill-decode"
    section = "decode"

    tier: str = Field(
        "",
        description="tier to which this worker belongs, one of the routers' --tiers; empty means the only tier",
    )
    quantize: Quantization | None = Field(
        None,
        description="format to which the decoder's weights are rounded on load: none or int8; by default as the pair "
        "says; int8 needs --engine overfill",
    )
    kv_codec: CodecName | None = Field(
        None,
        description="encoding of transferred KV; a request may choose another; int8 halves the bytes and costs some "
        "quality; by default raw, or int8 with --kv-cache-dtype int8",
    )
    kv_cache_dtype: KvCacheDtype = Field(
        "auto",
        description="data type of the KV cache: auto means --dtype; int8 needs half of bfloat16's memory and costs "
        "some quality",
    )
    data_streams: int = Field(
        2,
        ge=1,
        le=MAX_DATA_STREAMS,
        description="number of parallel connections that transfer a request's KV; with ranks, of each rank to each "
        "that serves some of its heads, and at most 64 of all ranks",
    )
    adapters: Folder | None = Field(
        None,
        description="folder with a folder for each adapter, named after it; the worker loads those of its decoder when "
        "it starts; without a folder, it has no adapters and no memory for them",
    )
    max_adapters: int = Field(
        8, ge=0, description="with --adapters, maximum number of loaded adapters; 0 means none, as without --adapters"
    )
    max_adapter_rank: int = Field(
        16, ge=1, description="with --adapters, largest rank of an adapter; each of --max-adapters takes its memory"
    )

    @model_validator(mode="after")
    def _check_streams(self) -> Self:
        if self.data_streams * self.tensor_parallel_size > MAX_DATA_STREAMS:
            raise ValueError(
                f"--data-streams {self.data_streams}: {self.tensor_parallel_size} ranks may have "
                f"{MAX_DATA_STREAMS // self.tensor_parallel_size} each, because a prefill worker sends a request's KV "
                f"in at most {MAX_DATA_STREAMS} streams"
            )
        return self

    @model_validator(mode="after")
    def _check_tier(self) -> Self:
        if self.tier:
            check_tier_name(self.tier)
        return self

    def check_files(self) -> None:
        """As of every service. Raises InvalidRequest if the folder of adapters is missing."""
        super().check_files()
        if self.adapters is not None and not self.adapters.is_dir():
            raise InvalidRequest("--adapters", f"there is no folder {self.adapters}; create it, or remove the setting")

    @property
    def decoder_settings(self) -> dict[str, str]:
        """The settings of a tier that say how this worker runs the pair's decoder. Routers compare them."""
        settings = {} if self.quantize is None else {"quantize": str(self.quantize)}
        return settings if self.kv_cache_dtype == "auto" else settings | {"kv_cache_dtype": str(self.kv_cache_dtype)}

    @property
    def codec(self) -> CodecName:
        """Codec in which the worker requests KV, unless the request chooses one."""
        return self.kv_codec or ("int8" if self.kv_cache_dtype == "int8" else "raw")


class ColocatedConfig(PrefillingConfig, DecodeConfig):
    """Worker with both stages: runs the full model and the decoder, in turn. Each flag is also a variable, such as
    OVERFILL_COLOCATED_KV_MEMORY."""

    prefix = "OVERFILL_COLOCATED_"
    program = "overfill-colocated"
    section = "colocated"

    max_num_batched_tokens: int = Field(
        2048,
        ge=1,
        description="maximum number of prompt tokens computed in one step; less while answers need --itl-objective",
    )
    kv_memory: Bytes | None = Field(
        None,
        description="size of each of the two KV caches, such as 512MiB; by default as much as fits in memory, but at "
        "most 1GiB on a CPU",
    )
    ttft_objective: float = Field(
        TTFT_OBJECTIVE,
        gt=0,
        description="target for the time to first token, in seconds; a prompt that meets it only with full chunks may "
        "delay answers",
    )
    itl_objective: float = Field(
        ITL_OBJECTIVE,
        gt=0,
        description="target for the time between tokens, in seconds; prompts are computed in chunks that allow it, or "
        "in full ones if such chunks would have fewer than 16 tokens or cost too much time per step",
    )

    @model_validator(mode="after")
    def _check_engine(self) -> Self:
        if self.engine == "vllm":
            raise ValueError(
                "--engine vllm: a worker with both stages runs on OverFill's own engine; for vLLM start a worker for "
                "each stage, as `overfill up --prefill 1 --decode 1 --engine vllm` does"
            )
        if self.engine_args and self.engine != "mock":
            raise ValueError(
                "--engine-args are for vLLM, and a worker with both stages runs on OverFill's own engine: remove them"
            )
        if self.tensor_parallel_size > 1:
            raise ValueError(
                f"--tensor-parallel-size {self.tensor_parallel_size}: only vLLM has ranks, and a worker with both "
                "stages runs on OverFill's own engine; start a worker for each stage, as `overfill up --prefill 1 "
                "--decode 1 --engine vllm` does"
            )
        return self


class RouterConfig(ServiceConfig):
    """Router: clients' APIs, queue, placement. Each flag is also a variable, such as OVERFILL_ROUTER_MAX_QUEUE."""

    prefix = "OVERFILL_ROUTER_"
    program = "overfill-router"
    section = "router"
    rpcs = ROUTER_RPCS
    role = Role.ROUTER

    pair: PairName = Field(
        "",
        description="name of a pair (default, fast, identity) or a pair's folder, of which the router reads the "
        "tokenizer; by default that of the default tier of --tiers",
    )
    port: Port = Field(7600, description="port to listen on; 0 picks a free one")
    share_port: Path | None = Field(
        None,
        description="folder through which this router shares --port and --http with the other router processes of this "
        "machine that name the same folder; they count the limits of API keys together; the folder must be empty after "
        "a reboot, such as one in /run; by default the ports are this router's alone",
    )
    join_port: Port = Field(
        0, description="with --share-port, port at which workers join this process alone; 0 picks a free one"
    )
    served_model_name: Names = Field(
        (),
        description="model names that clients may request, separated by commas; answers carry the first; by default "
        "the pair's name",
    )
    tool_call_parser: ToolCallParser = Field(
        "auto",
        description="format in which the model writes tool calls, by the name of vLLM's parser; auto chooses by the "
        "chat template, and hermes for an unknown one",
    )
    tiers: Tiers = Field(
        (),
        description="tiers of the stack, separated by semicolons, each NAME=PAIR[:WORKERS][,SETTING=VALUE...]; the "
        "router's settings are fallback=TIER, ttft-objective and itl-objective; by default one tier, of --pair",
    )
    default_tier: str = Field(
        "",
        description="tier of requests that name none; by default the tier called default, or else the first one",
    )
    canary_revision: Revision = Field(
        "",
        description="during a rollout, name of the new revision, served beside --revision; by default "
        "the router serves one revision",
    )
    canary_pair: PairName = Field("", description="with --canary-revision, the new revision's pair, as --pair")
    canary_tiers: Tiers = Field(
        (),
        description="with --canary-revision, the new revision's tiers, as --tiers, and with the same names",
    )
    canary_percent: float = Field(
        0.0,
        ge=0,
        le=100,
        description="the new revision's share of new conversations until `overfill rollout` changes it, in percent",
    )
    brownout: TierOrder = Field(
        (),
        description="tiers from the best to the cheapest, such as 'full > default > fast'; when one cannot meet its "
        "objectives, the next writes the answers of requests that allow it; by default none",
    )
    expect_prefill: int = Field(
        0, ge=0, description="number of prefill workers that must be ready before the stack counts as complete"
    )
    expect_decode: int = Field(
        0, ge=0, description="number of decode workers that must be ready before the stack counts as complete"
    )
    prefill_policy: PolicyName = Field(
        PREFILL_DEFAULT, description="policy that chooses the prefill worker of a prompt"
    )
    decode_policy: DecodePolicyName = Field(
        DECODE_DEFAULT, description="policy that chooses the decode worker of a request"
    )
    max_queue: int = Field(
        1024, ge=1, description="maximum number of queued requests per priority; the router refuses further ones"
    )
    max_wait: float | None = Field(
        None,
        gt=0,
        description="maximum expected seconds in the queue; the router refuses requests that would wait longer; by "
        "default it refuses only requests that would miss their deadline",
    )
    absent_after: float | None = Field(
        None,
        gt=0,
        description="seconds without any worker of a stage after which requests that need one fail; by default twice "
        "the longest start-up time of the stage's workers, but at least 10",
    )
    chat_template: Path | None = Field(
        None,
        description="file with a chat template in Jinja, which replaces the one of the pair; every router of a stack "
        "needs the same",
    )
    reasoning_parser: ReasoningParser = Field(
        "auto",
        description="format of what the model thinks before it answers, by vLLM's name; auto means the one that the "
        "chat template shows; none leaves it in the answer; every router of a stack needs the same",
    )
    stream_interval: int = Field(
        1,
        ge=1,
        le=MAX_STREAM_INTERVAL,
        description="minimum number of tokens in a streamed event, except in the first and the last one; a request may "
        "ask for a larger one; with 1, tokens are merged only when the router cannot keep up",
    )
    drop_attribution: bool = Field(
        True,
        description="leave Claude Code's line x-anthropic-billing-header at the beginning of system messages out of "
        "prompts; it differs between sessions, so that their prompts would share no cached beginning",
    )
    http: PortOrOff = Field(
        "off", description="port of the OpenAI endpoint; 0 picks a free port; off disables the endpoint"
    )
    allowed_origins: Origins = Field(
        (),
        description="origins of web pages that may use the OpenAI endpoint from a browser, separated by commas, such "
        "as https://chat.example.org; * allows every page; by default only the router's own page at /ui",
    )
    ttft_objective: float = Field(
        TTFT_OBJECTIVE,
        gt=0,
        description="target for the time to first token, in seconds, for which the scaling metrics are computed",
    )
    itl_objective: float = Field(
        ITL_OBJECTIVE,
        gt=0,
        description="target for the mean time between tokens, in seconds, for which the scaling metrics are computed",
    )
    max_request_bytes: int = Field(4 << 20, ge=1024, le=8 << 20, description="maximum size of a request, in bytes")
    max_body_bytes: int = Field(
        128 << 20,
        ge=8 << 20,
        description="maximum size of all HTTP bodies in receipt together, in bytes; an API key may hold a quarter",
    )
    max_connections: int = Field(
        8192,
        ge=1,
        le=MAX_PENDING_RPCS,
        description="maximum number of concurrent HTTP connections, and also of concurrent RPCs",
    )
    max_attempts: int = Field(
        4,
        ge=1,
        description="number of workers lost in a row, without a new token in between, after which a request fails",
    )
    max_request_time: float = Field(
        3600.0, gt=0, description="maximum seconds for a request, from its arrival to the end of its answer"
    )

    @model_validator(mode="after")
    def _check_tiers(self) -> Self:
        if not self.pair and not self.tiers:
            pair, tiers = self.variable("pair"), self.variable("tiers")
            raise ValueError(f"give --pair (or {pair}), or for several tiers --tiers (or {tiers})")
        check_tiers(self.ordered_tiers, self.default_tier, self.brownout)
        return self

    @property
    def ordered_tiers(self) -> tuple[TierSpec, ...]:
        """The tiers of the stack, the default one first."""
        if not self.tiers:
            return (TierSpec(name=DEFAULT_TIER, pair=self.pair, replicas=max(1, self.expect_decode)),)
        first = default_tier([tier.name for tier in self.tiers], self.default_tier)
        return tuple(sorted(self.tiers, key=lambda tier: tier.name != first))

    @model_validator(mode="after")
    def _check_canary(self) -> Self:
        if not self.canary_revision:
            for name in ("canary_pair", "canary_tiers", "canary_percent"):
                if getattr(self, name):
                    raise ValueError(f"--{flag_name(name)} needs --canary-revision: give the new revision a name")
            return self
        if self.canary_revision == self.revision:
            raise ValueError(
                f"--canary-revision {self.canary_revision}: --revision has the same name; give the new one another"
            )
        if bool(self.canary_pair) == bool(self.canary_tiers):
            raise ValueError(f"--canary-revision {self.canary_revision}: give either --canary-pair or --canary-tiers")
        names = [sorted(tier.name for tier in spec.tiers) for spec in self.revisions]
        check_tiers(self.revisions[1].tiers)
        if names[0] != names[1]:
            # A client names a tier, and not a revision.
            raise ValueError(
                f"{'--canary-tiers' if self.canary_tiers else '--canary-pair'}: both revisions must have the same "
                f"tiers; got {', '.join(names[1])} for the new one, and {', '.join(names[0])} for the old one"
            )
        return self

    @property
    def revisions(self) -> list[RevisionSpec]:
        """The revisions that this router serves, the old one first: two during a rollout, or else one."""
        old = RevisionSpec(self.revision, self.ordered_tiers)
        if not self.canary_revision:
            return [old]
        tiers = self.canary_tiers or (TierSpec(name=DEFAULT_TIER, pair=self.canary_pair),)
        first = old.tiers[0].name
        ordered = tuple(sorted(tiers, key=lambda tier: tier.name != first))
        return [old, RevisionSpec(self.canary_revision, ordered)]

    @model_validator(mode="after")
    def _check_shared_port(self) -> Self:
        if self.share_port is None and self.join_port:
            raise ValueError(
                "--join-port is for routers that share a port: give --share-port too, or remove --join-port; workers "
                "join other routers at --port"
            )
        if self.share_port is not None and 0 in (self.port, self.http):
            raise ValueError("--share-port needs the same ports on every router: give --port and --http a number")
        return self

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        if self.api_keys is None and not is_loopback(self.host):
            raise ValueError(
                f"--host {self.host} is open to other machines: give --api-keys FILE (`overfill keys create` makes the "
                "file), or keep --host 127.0.0.1"
            )
        if self.api_keys is not None and self.stack_secret is None and self.tls_ca is None:
            raise ValueError(
                "with --api-keys, workers must prove that they belong to the stack: give all processes the same "
                "--stack-secret FILE (`openssl rand -hex 32` makes a secret), or --tls-cert, --tls-key and --tls-ca"
            )
        return self

    def access(self) -> AccessPolicy:
        return self.router_access(self.key_ring())

    def router_access(self, keys: KeyRing | None) -> AccessPolicy:
        """Returns the access policy of RPCs and HTTP routes; ``keys`` are already loaded. Raises BadKeyFile."""
        return AccessPolicy(self.rpcs, None if keys is None else keys.find, self._secret())


SERVICES: tuple[type[ServiceConfig], ...] = (RouterConfig, PrefillConfig, DecodeConfig, ColocatedConfig)


def read_checked(path: Path) -> ConfigFile:
    """Reads a settings file and checks that all its keys exist. Raises BadConfigFile."""
    keys = {kind.section: [flag_name(name) for name in kind.model_fields if name != "config"] for kind in SERVICES}
    known = {COMMON: {key for some in keys.values() for key in some}, **keys}
    file = read_config_file(path)
    file.check(known)
    # TOML has booleans, which a numeric field would accept as 0 or 1, and `off` must be written "off" there.
    switches = {
        flag_name(name) for kind in SERVICES for name, field in kind.model_fields.items() if field.annotation is bool
    }
    faults = [
        f'{path}: {section}.{key}: expected text or a number, such as "off" or 8000, got {str(value).lower()}'
        for section, settings in file.sections.items()
        for key, value in settings.items()
        if isinstance(value, bool) and key not in switches
    ]
    if faults:
        raise BadConfigFile(faults)
    return file
