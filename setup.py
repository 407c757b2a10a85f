"""The wheel carries the settings and stages that `teachonce init` writes; all else is in pyproject.toml.

They stand at the top of the repository, where `dvc repro` reads them, and not a second time in a package:
the build puts them there.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithTemplate(build_py):
    """`build_py`, and params.yaml and dvc.yaml into pipeline/template/."""

    def run(self) -> None:
        """Build; an editable install reads the files where they stand."""
        super().run()
        if not self.editable_mode:
            for name in ("params.yaml", "dvc.yaml"):
                target = Path(self.build_lib, "pipeline/template", name)
                self.mkpath(str(target.parent))
                self.copy_file(name, str(target))


setup(cmdclass={"build_py": BuildWithTemplate})
