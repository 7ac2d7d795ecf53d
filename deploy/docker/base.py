"""Makes a base image without a registry: this machine's release of Debian, and the Python that runs this program.

    python deploy/docker/base.py NAME

Needs root, debootstrap and docker. A wheel that pip installs on this machine also works in the image, because both have
the same C library and the same Python. The base trusts the certificate authorities that this machine trusts.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
# Extension modules of the standard library that are not needed, and would bring X11.
_LEFT_OUT = ("_tkinter", "nis", "_gdbm", "_dbm", "_test", "_ctypes_test", "xxlimited")


class CannotMakeBase(Exception):
    """The base cannot be made here; the message says what is missing."""


def make_base(name: str) -> None:
    """Make the image ``name``. Takes a minute; Debian's packages come from debootstrap's mirror.

    Raises:
        CannotMakeBase: this is not Debian, root or debootstrap is missing, or a step failed.
    """
    release = platform.freedesktop_os_release()
    if release.get("ID") != "debian":
        raise CannotMakeBase("debootstrap makes a base on Debian only")
    if os.geteuid() != 0:
        raise CannotMakeBase("debootstrap needs root")
    if shutil.which("debootstrap") is None:
        raise CannotMakeBase("debootstrap is not installed")
    own = Path(sys.base_prefix)
    packages = ["ca-certificates"]
    packages += ["python3", "python3-venv"] if own == Path("/usr") else _owners_of_libraries(own)
    with tempfile.TemporaryDirectory(prefix="overfill-base-") as folder:
        root = Path(folder) / "root"
        suite = release["VERSION_CODENAME"]
        _run("debootstrap", "--variant=minbase", f"--include={','.join(packages)}", suite, str(root))
        if own == Path("/usr"):
            (root / "usr/bin/python").symlink_to("python3")
        else:
            _copy_python(own, root / "usr/local")
            _run("chroot", str(root), "ldconfig")
        trusted = Path("/etc/ssl/certs/ca-certificates.crt")
        if trusted.exists():
            shutil.copy(trusted, root / "etc/ssl/certs/ca-certificates.crt")
        for leftover in [*root.glob("var/cache/apt/archives/*.deb"), *root.glob("var/lib/apt/lists/*_*")]:
            leftover.unlink()
        archive = Path(folder) / "root.tar"
        _run("tar", "-C", str(root), "-cf", str(archive), ".")
        _run(
            "docker", "import", "--change", "ENV PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", str(archive), name
        )


def _owners_of_libraries(own: Path) -> list[str]:
    """Return the Debian packages of the libraries that Python's extension modules are linked to."""
    modules = (own / f"lib/python{_VERSION}/lib-dynload").glob("*.so")
    used = [str(path) for path in modules if not path.name.startswith(_LEFT_OUT)]
    done = subprocess.run(["ldd", *used], capture_output=True, text=True, check=False)
    libraries = {Path(path).name for path in re.findall(r"=> (/\S+)", done.stdout) if not path.startswith(str(own))}
    owners = set()
    for library in sorted(libraries):
        found = subprocess.run(["dpkg", "-S", f"*/{library}"], capture_output=True, text=True, check=False)
        owners.add(found.stdout.partition(":")[0])
    return sorted(owners - {""})


def _copy_python(own: Path, target: Path) -> None:
    library = f"lib/python{_VERSION}"
    left_out = shutil.ignore_patterns(
        "site-packages", "test", "idlelib", "tkinter", "turtledemo", f"config-{_VERSION}*", "__pycache__",
        *(f"{name}*.so" for name in _LEFT_OUT),
    )  # fmt: skip
    shutil.copytree(own / library, target / library, symlinks=True, ignore=left_out)
    (target / library / "site-packages").mkdir()
    for shared in (own / "lib").glob("libpython*.so*"):
        shutil.copy2(shared, target / "lib", follow_symlinks=False)
    shutil.copy2(own / f"bin/python{_VERSION}", target / "bin")
    for link in ("python3", "python"):
        (target / "bin" / link).symlink_to(f"python{_VERSION}")


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CannotMakeBase(f"{command[0]} cannot run: {error.strerror}") from error
    if done.returncode:
        lines = (done.stderr + done.stdout).strip().splitlines() or ["no message"]
        raise CannotMakeBase(f"{command[0]} failed: {lines[-1]}")


def main() -> None:
    try:
        make_base(sys.argv[1])
    except CannotMakeBase as error:
        sys.exit(f"no base image: {error}")


if __name__ == "__main__":
    main()
