"""Tests the services' settings: flags, variables, refusals, and their conversion back to flags."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from overfill.api.keys import BadKeyFile
from overfill.errors import InvalidRequest
from overfill.settings.config import ColocatedConfig, DecodeConfig, PrefillConfig, RouterConfig, ServiceConfig
from overfill.settings.reader import SETTINGS, BadSettings

KINDS = (PrefillConfig, DecodeConfig, RouterConfig)


@pytest.fixture(autouse=True)
def _no_settings_in_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in KINDS:
        for field in kind.model_fields:
            monkeypatch.delenv(f"{kind.prefix}{field}".upper(), raising=False)


def refused(kind: type[ServiceConfig], argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        kind.parse(argv)
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_pair_is_required(kind: type[ServiceConfig], capsys: pytest.CaptureFixture[str]) -> None:
    config = kind.parse(["--pair", "p"])
    assert config.pair == "p"
    assert config.host == "127.0.0.1"
    message = refused(kind, [], capsys)
    assert "--pair" in message
    assert f"{kind.prefix}PAIR" in message


def test_flags_are_kebab_case_and_typed() -> None:
    config = PrefillConfig.parse(
        ["--pair", "p", "--kv-memory", "512MiB", "--max-model-len", "4096", "--routers", "a:1,b:2,dns:///c:3"]
    )
    assert config.kv_memory == 512 * 2**20
    assert config.max_model_len == 4096
    assert config.routers == ("a:1", "b:2", "dns:///c:3")


@pytest.mark.parametrize("kind", [PrefillConfig, DecodeConfig])
def test_a_full_batch_leaves_room_for_other_calls(kind: type[PrefillConfig] | type[DecodeConfig]) -> None:
    widest = DecodeConfig.parse(["--pair", "p", "--data-streams", "64"]).data_streams
    for sequences in (1, 64, 2048):
        config = kind.parse(["--pair", "p", "--max-num-seqs", str(sequences)])
        assert config.max_rpcs >= sequences * (1 + widest) + 100


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000])
def test_a_variable_with_all_settings_that_is_no_json_object_is_named(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(SETTINGS, text)
    assert f"error: {SETTINGS}: expected a JSON object" in refused(RouterConfig, [], capsys)


def test_variables_are_read_and_flags_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERFILL_DECODE_PAIR", "/pairs/x")
    monkeypatch.setenv("OVERFILL_DECODE_KV_MEMORY", "2GiB")
    monkeypatch.setenv("OVERFILL_DECODE_ROUTERS", "a:1,b:2")
    config = DecodeConfig.parse(["--kv-memory", "1048576"])
    assert (config.pair, config.kv_memory, config.routers) == ("/pairs/x", 2**20, ("a:1", "b:2"))


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--kv-memory", "12XB"], "--kv-memory (or OVERFILL_PREFILL_KV_MEMORY): must be a size such as 512MiB or 4GB"),
        (["--kv-memory", "0"], "must be a size above 0, such as 512MiB"),
        (
            ["--threads", "two"],
            "--threads (or OVERFILL_PREFILL_THREADS): must be a whole number of at least 1, got 'two'",
        ),
        (["--block-size", "0"], "BLOCK_SIZE): must be a whole number of at least 1, got '0'"),
        (["--dtype", "int8"], "DTYPE): must be float32, bfloat16 or float16, got 'int8'"),
        (["--device", "tpu"], "DEVICE): must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["--worker-id", "w" * 257], "WORKER_ID): must be at most 256 printable characters, got 'www"),
        (["--routers", "somewhere"], "HOST:PORT"),
        (["--port", "70000"], "PORT): must be a whole number from 0 to 65535, got '70000'"),
        (["--metrics-port", "on"], "METRICS_PORT): must be a whole number from 0 to 65535, or off, got 'on'"),
        (["--grace-period", "inf"], "GRACE_PERIOD): must be a number of at least 0, got 'inf'"),
        (["--grace-period", "-1"], "GRACE_PERIOD): must be a number of at least 0, got '-1'"),
        (["--step-timeout", "0"], "STEP_TIMEOUT): must be a number above 0, got '0'"),
        (
            ["--otlp-traces-endpoint", "x"],
            "OTLP_TRACES_ENDPOINT): must be a URL such as http://127.0.0.1:4317, got 'x'",
        ),
        (["--unheard-of", "1"], "--unheard-of: no such flag; `overfill-prefill --help` lists all flags"),
        (["--prefix-cache=off"], "--prefix-cache takes no value; give --prefix-cache or --no-prefix-cache"),
        (["--kv-memroy=1GiB"], "--kv-memroy: no such flag; did you mean --kv-memory?"),
        (["--kv-mem", "1GiB"], "--kv-mem:"),  # abbreviations are refused, because a new flag could make them ambiguous
        (["--kv-memory"], "--kv-memory"),
        (["stray"], "unexpected 'stray'"),
    ],
)
def test_a_wrong_flag_is_named_in_one_line(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(PrefillConfig, ["--pair", "p", *argv], capsys)
    assert says in message
    assert message.count("\n") == 1


def test_a_repeated_flag_adds_values_and_an_empty_one_is_not_set() -> None:
    config = PrefillConfig.parse(["--pair=p", "--routers=a:1", "--routers=b:2", "--kv-memory=", "--threads=1"])
    assert (config.routers, config.kv_memory) == (("a:1", "b:2"), None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.org"])
@pytest.mark.parametrize("kind", [RouterConfig, PrefillConfig, DecodeConfig])
def test_an_open_host_needs_certificates_of_both_sides(
    kind: type[ServiceConfig], host: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--pair", "p", "--host", host]
    if kind is not RouterConfig:
        argv += ["--advertise", "gpu-1.internal"]
    assert "--tls-cert" in refused(kind, argv, capsys)
    certified = [*argv, "--tls-cert", "c", "--tls-key", "k"]
    assert "--tls-ca" in refused(kind, certified, capsys)
    certified += ["--tls-ca", "a"]
    if kind is RouterConfig:
        assert "--api-keys" in refused(kind, certified, capsys)
        assert "--tls-ca" in refused(kind, [*argv, "--tls-cert", "c", "--tls-key", "k", "--api-keys", "k.json"], capsys)
        certified += ["--api-keys", "keys.json"]
    assert kind.parse(certified).host == host


def test_with_keys_workers_need_a_secret_or_a_certificate(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--pair", "p", "--api-keys", "keys.json"]
    assert "--stack-secret" in refused(RouterConfig, argv, capsys)
    assert RouterConfig.parse([*argv, "--stack-secret", "s"]).stack_secret == Path("s")
    assert RouterConfig.parse([*argv, "--tls-cert", "c", "--tls-key", "k", "--tls-ca", "a"]).stack_secret is None


def test_an_invalid_secret_is_refused_and_never_shown(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    config = RouterConfig.parse(["--pair", "p", "--stack-secret", str(file)])
    for text in (None, "", "short", "\n" * 40):
        if text is not None:
            file.write_text(text)
        with pytest.raises(BadKeyFile, match="secret"):
            config.access()
    file.write_text("not to be seen by anybody\n")
    assert config.credentials().secret == "not to be seen by anybody"  # type: ignore[union-attr]
    assert "seen" not in f"{config.credentials()!r} {config.access()!r} {config!r}"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]"])
@pytest.mark.parametrize("kind", [PrefillConfig, DecodeConfig])
def test_a_worker_on_every_address_must_say_where_it_is(
    kind: type[ServiceConfig], host: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--pair", "p", "--host", host, "--tls-cert", "c", "--tls-key", "k", "--tls-ca", "a"]
    assert "--advertise" in refused(kind, argv, capsys)
    assert "--advertise" in refused(kind, [*argv, "--advertise", host], capsys)
    if host != "::":  # "::" with a port is another address
        assert "--advertise" in refused(kind, [*argv, "--advertise", f"{host}:7601"], capsys)
    config = kind.parse([*argv, "--advertise", "gpu-1.internal"])
    assert (config.host, config.advertise) == (host, "gpu-1.internal")  # type: ignore[attr-defined]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", "::1"])
def test_loopback_needs_no_certificates(host: str) -> None:
    assert RouterConfig.parse(["--pair", "p", "--host", host]).server_tls() is None


def test_tls_certificate_and_key_go_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--tls-key" in refused(RouterConfig, ["--pair", "p", "--tls-cert", "c"], capsys)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--join-port=7"], "give --share-port too"),
        (["--share-port=/run/x", "--port=0"], "the same ports on every router"),
        (["--share-port=/run/x", "--http=0"], "the same ports on every router"),
    ],
)
def test_routers_that_share_a_port_name_it(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in refused(RouterConfig, ["--pair", "p", *argv], capsys)
    config = RouterConfig.parse(["--pair=p", "--share-port=/run/x", "--join-port=7601"])
    assert RouterConfig.of(config.settings()) == config


def test_the_port_of_metrics_can_be_set_or_off(capsys: pytest.CaptureFixture[str]) -> None:
    assert RouterConfig.parse(["--pair", "p"]).metrics_port == 0
    assert RouterConfig.parse(["--pair", "p", "--metrics-port", "9600"]).metrics_port == 9600
    off = RouterConfig.parse(["--pair", "p", "--metrics-port", "off", "--metrics-host", "0.0.0.0"])
    assert off.metrics_port == "off"
    assert RouterConfig.of(off.settings()) == off
    assert "--metrics-port" in refused(RouterConfig, ["--pair", "p", "--metrics-port", "on"], capsys)
    assert "--metrics-host" in refused(RouterConfig, ["--pair", "p", "--metrics-host", "0.0.0.0"], capsys)


def test_probes_are_off_by_default_and_open_to_others_only_with_a_certificate(
    capsys: pytest.CaptureFixture[str],
) -> None:
    open_host = ["--pair", "p", "--probe-host", "0.0.0.0"]
    assert DecodeConfig.parse(open_host).probe_port == "off"
    assert "--probe-host 0.0.0.0" in refused(DecodeConfig, [*open_host, "--probe-port", "7691"], capsys)
    certificate = ["--tls-cert", "tls.crt", "--tls-key", "tls.key"]
    assert DecodeConfig.parse([*open_host, *certificate, "--probe-port", "7691"]).probe_port == 7691


@pytest.mark.parametrize(
    ("kind", "argv"),
    [
        (PrefillConfig, ["--kv-memory", "1GiB", "--routers", "a:1,b:2", "--dtype", "float32", "--tls-ca", "x y"]),
        (DecodeConfig, ["--data-streams", "4", "--worker-id", "decode-0", "--grace-period", "0.5"]),
        (RouterConfig, ["--port", "0", "--served-model-name", "m=1,other", "--expect-decode", "2"]),
    ],
)
def test_a_process_reads_its_settings_as_json(
    kind: type[ServiceConfig], argv: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = kind.parse(["--pair=-odd folder", *argv])
    assert len(config.settings()) == 1 + len(argv) // 2, "defaults are left out"
    (variable, text), *others = config.environment().items()
    assert not others
    monkeypatch.setenv(variable, text)
    monkeypatch.setenv(kind.variable("grace_period"), "1")
    assert kind.parse(["--grace-period=2"]) == config, "nothing else is read"
    monkeypatch.setenv(variable, '{"pair": "p", "grace_period": -1}')
    with pytest.raises(SystemExit) as caught:
        kind.parse([])
    assert caught.value.code == 2


@pytest.mark.parametrize("kind", KINDS)
def test_help_names_every_flag(kind: type[ServiceConfig], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        kind.parse(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for field in kind.model_fields:
        assert re.search(rf"--{field.replace('_', '-')}[ ,]", text)
        assert kind.model_fields[field].description, field
    assert "--kv-memory SIZE" in text or kind is RouterConfig
    assert "--metrics-port N|off" in text
    python = r"tuple\[|ByteSize|\{int|\(default:\s+(None)?\)|--\S+ (str|int|float|Path)\b"
    assert not re.search(python, text), "Python's names of types and values"


def test_loads_no_torch() -> None:
    code = "import sys, overfill.settings.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_settings_by_name_make_the_same_configuration_and_the_same_errors() -> None:
    config = DecodeConfig.parse(["--pair", "p", "--kv-memory", "1MiB", "--routers", "a:1,ray:///stack"])
    assert DecodeConfig.of(config.settings()) == config
    assert DecodeConfig.of({"pair": "p", "kv_memory": "1MiB", "data_streams": 3}).kv_memory == 1 << 20
    with pytest.raises(ValueError, match="kv_memroy: no such setting; did you mean kv_memory"):
        DecodeConfig.of({"pair": "p", "kv_memroy": "1MiB"})
    with pytest.raises(ValueError, match="--data-streams"):
        DecodeConfig.of({"pair": "p", "data_streams": 0})


@pytest.mark.parametrize(
    ("kind", "argv", "words"),
    [
        (DecodeConfig, "--tensor-parallel-size 0", "--tensor-parallel-size"),
        (PrefillConfig, "--tensor-parallel-size 2 --engine overfill", "only vLLM has ranks; give --engine vllm"),
        (DecodeConfig, "--tensor-parallel-size 2 --engine mock", "in place of mock"),
        (DecodeConfig, "--tensor-parallel-size 8 --data-streams 9", "--data-streams 9: 8 ranks may have 8 each"),
        (ColocatedConfig, "--tensor-parallel-size 2", "a worker with both stages runs on OverFill's own engine"),
        (PrefillConfig, "--tensor-parallel-size 4 --data-port 65533", "rank 3 would have port 65536, above 65535"),
        (PrefillConfig, "--tensor-parallel-size 4 --data-port 7600 --port 7603", "up to 7603, and --port is 7603"),
        (PrefillConfig, "--data-port 7690 --metrics-port 7690", "--metrics-port is 7690"),
        (PrefillConfig, "--data-port 7691 --probe-port 7691", "--probe-port is 7691"),
    ],
)
def test_ranks_that_cannot_be_are_refused_by_name(
    kind: type[ServiceConfig], argv: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(kind, ["--pair", "p", *argv.split()], capsys)


def test_a_missing_folder_of_adapters_is_named(tmp_path: Path) -> None:
    DecodeConfig(pair="p", adapters=tmp_path).check_files()
    with pytest.raises(InvalidRequest, match=f"--adapters: there is no folder {tmp_path}/x"):
        ColocatedConfig(pair="p", adapters=tmp_path / "x").check_files()


def test_ranks_have_consecutive_ports() -> None:
    argv = ["--pair", "p", "--tensor-parallel-size", "4", "--data-port", "7604", "--port", "7603"]
    assert PrefillConfig.read(argv).data_port == 7604
    assert PrefillConfig.read([*argv[:-3], "65532"]).data_port == 65532


def test_settings_by_name_read_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERFILL_DECODE_CONFIG", "/nowhere/overfill.yaml")
    with pytest.raises(BadSettings, match=r"^--data-streams"):
        DecodeConfig.of({"pair": "p", "data_streams": 0})


@pytest.mark.parametrize("kind", [PrefillConfig, ColocatedConfig])
def test_a_folder_for_kv_is_a_setting_of_workers_that_prefill(kind: type[ServiceConfig]) -> None:
    config = kind.parse(["--pair", "p", "--kv-disk", "kv", "--kv-disk-size", "2GiB"])
    assert isinstance(config, PrefillConfig | ColocatedConfig)
    assert config.kv_disk == Path.cwd() / "kv"  # on Ray, workers start in another folder
    assert (config.kv_disk_size, config.kv_disk_bandwidth) == (2 << 30, 1 << 30)


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        (["--tensor-parallel-size", "2"], "ranks have the KV"),
        (["--no-prefix-cache"], "remove --no-prefix-cache"),
    ],
)
def test_a_folder_for_kv_is_refused_where_it_could_not_be_used(
    flags: list[str], advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    PrefillConfig.parse(["--pair", "p", *flags])
    assert advice in refused(PrefillConfig, ["--pair", "p", "--kv-disk", "kv", *flags], capsys)


def test_a_router_serves_one_revision_or_during_a_rollout_two() -> None:
    one = RouterConfig.parse(["--pair", "a", "--revision", "r1"]).revisions
    assert [(revision.name, revision.tiers[0].pair) for revision in one] == [("r1", "a")]
    argv = ["--tiers", "fast=a;full=b", "--default-tier", "full", "--canary-revision", "r2"]
    old, new = RouterConfig.parse([*argv, "--canary-tiers", "fast=c;full=d:2", "--canary-percent", "12.5"]).revisions
    assert (old.name, [tier.pair for tier in old.tiers]) == ("", ["b", "a"])
    assert (new.name, [tier.pair for tier in new.tiers]) == ("r2", ["d", "c"])


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--revision", "R1"], "REVISION): must be 1 to 32 lower-case"),
        (["--canary-pair", "q"], "--canary-pair needs --canary-revision"),
        (["--canary-percent", "5"], "--canary-percent needs --canary-revision"),
        (["--canary-revision", "r2"], "--canary-revision r2: give either --canary-pair or --canary-tiers"),
        (["--canary-revision", "r2", "--canary-pair", "q", "--canary-tiers", "a=b"], "--canary-revision r2: give"),
        (["--revision", "r2", "--canary-revision", "r2", "--canary-pair", "q"], "--canary-revision r2: --revision"),
        (["--canary-revision", "r2", "--canary-pair", "q", "--canary-percent", "101"], "CANARY_PERCENT): must be"),
        (["--canary-revision", "r2", "--canary-pair", "q", "--canary-percent", "nan"], "CANARY_PERCENT): must be"),
        (["--canary-revision", "r2", "--canary-tiers", "a=b;default=c"], "--canary-tiers: both revisions must have"),
        (["--canary-revision", "r2", "--canary-tiers", "default=b;default=c"], "two tiers have the name 'default'"),
    ],
)
def test_a_wrong_revision_is_refused_by_its_flag(
    argv: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refused(RouterConfig, ["--pair", "p", *argv], capsys)
