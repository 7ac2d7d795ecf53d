"""An option with a wrong value, or that another one contradicts, is wrong usage, and the message names its flag."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from overfill.cli.main import main


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("generate Hi --top-p 2", "--top-p: must be"),
        ("generate Hi --temperature nan", "'--temperature'"),
        ("generate Hi --temperature -1", "--temperature"),
        ("generate Hi --top-p inf", "'--top-p'"),
        ("generate Hi --min-p nan", "'--min-p'"),
        ("generate Hi --timeout inf", "'--timeout'"),
        ("generate Hi --max-tokens 0", "--max-tokens"),
        ("generate Hi --seed -1", "--seed"),
        ("generate Hi --greedy --temperature 1", "--temperature"),
        ("generate Hi --greedy --top-k 5", "top_k"),
        ("generate Hi --raw --system-prompt x", "--system-prompt"),
        ("generate Hi --address http://127.0.0.1:8000", "HOST:PORT"),
        ("chat --address http://127.0.0.1:8000", "HOST:PORT"),
        ("status --address http://127.0.0.1:8000", "HOST:PORT"),
        ("status --address a:1,,b:2", "address is"),
        ("top --json --address http://127.0.0.1:8000", "HOST:PORT"),
        ("top --interval nan", "'--interval'"),
        ("health --address http://127.0.0.1:8000", "HOST:PORT"),
        ("health --address ''", "address is"),
        ("simulate --objective bogus=1", "--objective: 'bogus=1' is not a limit"),
        ("simulate --profile bogus", "--profile: must be one of cpu"),
        ("simulate --trace bogus.csv", "--trace: bogus.csv cannot be read"),
        ("simulate --colocated 1 --profile h100-l4", "--profile: colocated_kv_tokens: the profile"),
        ("loadtest --target foo", "--target: 'foo' has no port"),
        ("loadtest --users 0", "'--users'"),
        ("loadtest --duration nan", "'--duration'"),
        ("chaos --prefill=1", "--prefill 1: give at least 2"),
        ("chaos --decode=0", "--decode 0: give at least 2"),
        ("chaos --colocated=1", "--decode 0: give at least 1"),
        ("chaos --tier=a=tiny:2 --decode=3", "--tier conflicts with --decode"),
        ("chaos --tier=a=tiny", "give at least two decode workers"),
        ("chaos --tier=a=tiny --tier=a=tiny", "two tiers have the name"),
        ("chaos --tier=a=tiny --tier=b=fast", "all tiers have the pair tiny, or none"),
        ("up --port 1", "--http PORT"),
        ("up -tp 1", "--tensor-parallel-size N"),
        ("up --prefill-tensor-parallel-size 0", "at least 1, got '0'"),
        ("up --tensor-parallel-size 2 --engine overfill", "--tensor-parallel-size 2: only vLLM has ranks"),
        ("up --decode-tensor-parallel-size 2 --engine mock", "--tensor-parallel-size 2: only vLLM has ranks"),
        ("up --tensor-parallel-size 2 --colocated 1", "a worker with both stages runs on OverFill's own engine"),
        ("up --decode-tensor-parallel-size 2 --colocated 1", "--decode-tensor-parallel-size is for decode workers"),
        ("up --model 1", "overfill pair import"),
        ("up --enforce-eager 1", "--engine-args"),
        ("up --gpu-memory-utilization 1", "--kv-memory"),
        ("up --quantization 1", "--quantize int8"),
        ("up --grpc 7600 --http 7600", "is given to two servers, --grpc (router.ports) and --http"),
        ("up --grpc 7601 --http 7600 --router 2", "is given to two servers, --grpc (router.ports) and --http"),
        (
            "up --no-ray --colocated 1 --metrics-port 7999",
            "port 8000 is given to two servers, --http (router.http_ports) and --metrics-port",
        ),
        ("up --no-ray --metrics-port 65535", "a process would have port 65536"),
        ("up --no-ray --max-decode 3", "--no-ray conflicts with --max-decode"),
        ("up --no-ray --ray-address auto --name x", "--no-ray conflicts with --ray-address, --name"),
        ("up --decode 3 --max-decode 2", "--max-decode 2 is less than --decode 3"),
        ("up --ray-address auto --device cuda", "--device cuda needs --worker-gpus with --ray-address"),
        ("up --tier a=p --pair p", "--tier conflicts with --pair (also in the settings file, or as a variable)"),
        ("up --tier a=p --decode 1 --max-decode 3", "--tier conflicts with --decode and --max-decode"),
        ("up --tier a=p --tier a=q", "two tiers have the name 'a'"),
        ("up --tier a=p --default-tier b", "--default-tier: there is no tier 'b'; tiers are a"),
        ("up --tier a=p --brownout 'a > b'", "--brownout: there is no tier 'b'"),
        ("up --tier a=p --tier b=q:0", "the number of decode workers must be at least 1"),
        ("up --tier a=p --tier b", "expected NAME=PAIR"),
        ("up --tier a=p --no-ray --tier b=p:2,max=3", "--no-ray conflicts with max of --tier b"),
        ("up --tier a=p --tier b=p:2,max=1", "tier 'b': max must be a number of workers of at least 2, got '1'"),
        ("pair build --full m --out .", "--out': . already exists; give a new folder"),
        ("pair build --full m --out dangling", "--out': dangling already exists"),
        ("pair distill m --out .", "--out': . already exists"),
        ("pair import --full m --decoder m --out file/new", "file/new cannot be made, because"),
        ("pair eval m --out file", "--out': directory 'file' is a file"),
        ("pair compare m --out file/new", "file is a file"),
        (
            "pair calibrate --full m --out missing/x.jsonl",
            "x.jsonl cannot be made: make the folder missing first",
        ),
        ("pair distill-plot a=b --out .", "--out': file '.' is a directory"),
        ("pair distill-plot a=b --out x.gif", "--out': x.gif must end in .png, .svg, .pdf"),
        ("chaos --report missing/x", "--report': missing/x cannot be made"),
        ("pair distill-plot a=b --out missing/x.png", "--out': missing/x.png cannot be made"),
        ("loadtest --records missing/x", "--records': missing/x cannot be made"),
        ("pair build --full m --out x --intermediate-size 1.5", "--intermediate-size"),
        ("keys create 'no name'", "NAME: is 'no name'"),
        ("certs certs --name é", "--name: 'é' is neither"),
    ],
)
def test_a_wrong_option_is_wrong_usage_and_named(
    command: str, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    assert main(shlex.split(command)) == 2
    assert says.lower() in " ".join(capsys.readouterr().err.replace("│", " ").split()).lower()


@pytest.mark.parametrize("place", [".", "file"])
def test_an_output_that_this_user_may_not_write_is_refused_first(
    place: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    refused = (tmp_path / place).resolve()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != refused)  # root may write anywhere
    out = "new" if place == "." else place
    assert main(["pair", "calibrate", "--full", "m", "--out", out]) == 2
    assert f"{out} cannot be written, because you may not write to {refused}" in " ".join(
        capsys.readouterr().err.split()
    )
