"""Builds the wheel with `libkvtier.so` inside: `KVTIER_LIBRARY`, else the release or debug build of the workspace."""

import os
import shutil
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", HERE.parent / "target"))


def find_library() -> Path:
    """The library to bundle."""
    named = os.environ.get("KVTIER_LIBRARY")
    candidates = [Path(named)] if named else [TARGET / kind / "libkvtier.so" for kind in ("release", "debug")]
    for path in candidates:
        if path.is_file():
            return path
    raise SystemExit(
        "libkvtier.so not found: build it with `cargo build --release -p kvtier-connector-ffi`, or set KVTIER_LIBRARY"
    )


class BuildWithLibrary(build_py):
    """Copies the library into the package."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copy2(find_library(), Path(self.build_lib) / "kvtier" / "libkvtier.so")


class PlatformWheel(bdist_wheel):
    """Any Python 3, this platform only."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class BinaryDistribution(Distribution):
    """Makes setuptools write a platform wheel although there is no extension module."""

    def has_ext_modules(self) -> bool:
        return True


setup(cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": PlatformWheel}, distclass=BinaryDistribution)
