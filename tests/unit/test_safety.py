"""The code loads no pickle from elsewhere, runs no downloaded code, and lets no archive decide where it is unpacked."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [*(ROOT / "overfill").rglob("*.py"), *(ROOT / "services").rglob("*.py"), *(ROOT / "deploy").rglob("*.py")]

MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle", "imp"}
"""Modules whose loading functions can run code from the loaded file."""

BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {
    "torch.load": "pickle inside; safetensors or weights_only=True instead",
    "torch.save": "pickle inside; safetensors instead",
    "torch.hub.load": "runs code from elsewhere",
    "torch.jit.load": "runs code from elsewhere",
    "os.system": "a shell",
    "os.popen": "a shell",
    "tempfile.mktemp": "another process may create the file first",
    "yaml.unsafe_load": "creates arbitrary objects",
    "yaml.full_load": "creates arbitrary objects",
}
METHODS = {"extractall": "an archive's own paths decide", "load_pickle": "pickle"}
FLAGS = {
    "trust_remote_code": True,
    "allow_pickle": True,
    "shell": True,
    "weights_only": False,
    "use_safetensors": False,
}


ALLOWED = {"overfill/engine/vllm/ranks/messages.py", "overfill/engine/vllm/ranks/steps.py"}
"""Modules with pickle, for messages between a worker and the ranks that it starts. They come over a Unix socket that
takes only processes of this user which know its token, and from vLLM, which pickles between the same processes."""


def faults(source: str) -> Iterator[str]:
    """Yield the unsafe places of a module, as ``line: description``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            found = [node.module or ""]
        else:
            found = []
        yield from (f"{node.lineno}: imports {name}" for name in found if name.partition(".")[0] in MODULES)  # type: ignore[attr-defined]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        flags = {keyword.arg: keyword.value for keyword in node.keywords}
        weights_only = "weights_only" in flags and ast.unparse(flags["weights_only"]) == "True"
        if name in BUILTINS or (name in CALLS and not (name == "torch.load" and weights_only)):
            yield f"{node.lineno}: {name}: {CALLS.get(name, 'runs text as code')}"
        last = name.rpartition(".")[2]
        if last in METHODS:
            yield f"{node.lineno}: {name}: {METHODS[last]}"
        if last == "extract" and "filter" not in flags and "archive" in name:
            yield f"{node.lineno}: {name}: an archive's own paths decide"
        for flag, bad in FLAGS.items():
            value = flags.get(flag)
            if value is not None and not (isinstance(value, ast.Constant) and value.value is not bad):
                yield f"{node.lineno}: {name}: {flag}={ast.unparse(value)}"
        if name == "yaml.load":
            loader = ast.unparse(flags["Loader"]) if "Loader" in flags else "none"
            if loader not in ("yaml.SafeLoader", "yaml.CSafeLoader", "_TextLoader", "_DocumentLoader"):
                yield f"{node.lineno}: yaml.load with loader {loader}"


def test_no_module_executes_data() -> None:
    assert len(SOURCES) > 200
    found = {str(path.relative_to(ROOT)): [*faults(path.read_text("utf-8"))] for path in SOURCES}
    for path in ALLOWED:
        (fault,) = found.pop(path)
        assert fault.endswith("imports pickle")
    assert not {path: wrong for path, wrong in found.items() if wrong}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from cloudpickle import dumps",
        "torch.load('x')",
        "torch.load('x', weights_only=flag)",
        "torch.save(1, 'x')",
        "eval(text)",
        "exec(text)",
        "os.system('ls')",
        "subprocess.run('ls', shell=True)",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
        "AutoModel.from_pretrained('x', trust_remote_code=options.trust)",
        "np.load('x', allow_pickle=True)",
        "tarfile.open('x').extractall()",
        "archive.extract('x')",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
    ],
)
def test_each_rule_notices(line: str) -> None:
    assert list(faults(line)), line


@pytest.mark.parametrize(
    "line",
    [
        "torch.load('x', weights_only=True)",
        "AutoModel.from_pretrained('x')",
        "model.eval()",
        "re.compile('x')",
        "yaml.safe_load(x)",
        "f(shell=False)",
    ],
)
def test_safe_code_is_accepted(line: str) -> None:
    assert not list(faults(line))


def test_the_loaders_of_settings_and_documents_make_plain_data_only() -> None:
    import yaml

    from overfill.settings.config_file import _TextLoader
    from overfill.stack.spec import _DocumentLoader

    assert issubclass(_DocumentLoader, yaml.SafeLoader)
    assert not issubclass(_TextLoader, yaml.FullLoader | yaml.UnsafeLoader | yaml.Loader)
    try:
        made = yaml.load("!!python/object/apply:os.getcwd []", Loader=_TextLoader)
    except yaml.YAMLError:
        return
    assert made == [], "it makes text, lists and mappings only"


def test_only_safetensors_are_fetched_from_a_hub() -> None:
    from overfill.making.sources import _CHECKPOINT_PATTERNS

    assert "*.safetensors" in _CHECKPOINT_PATTERNS
    assert not [p for p in _CHECKPOINT_PATTERNS if p.endswith((".bin", ".pt", ".pth", ".ckpt", ".py", ".pkl", "*"))]


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "a/../../outside.safetensors"])
def test_the_index_of_a_checkpoint_names_files_beside_it_only(tiny_pair: Path, tmp_path: Path, shard: str) -> None:
    import json
    import shutil

    from overfill.errors import InvalidPair
    from overfill.model.digest import checkpoint_digest

    folder = tmp_path / "full"
    shutil.copytree((tiny_pair / "full").resolve(), folder)
    shutil.copy(folder / "model.safetensors", tmp_path / "outside.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(InvalidPair, match="index"):
        checkpoint_digest(folder)
