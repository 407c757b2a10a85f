"""Which folder the name of a model means, and the hashes of the files that its loader reads.

No torch here: `check` looks at models in a fraction of a second, and a fingerprint is a matter of
bytes. Weights are read as safetensors only; a pickle is refused, not converted.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

from stages.files import located
from stages.params import IMPORTED
from storage.errors import MissingError, TeachonceError, shown

PACKAGE = "package:"

# What transformers and sentence-transformers read of a folder. Other formats of the same weights
# (onnx/, *.bin), cards and training leftovers change nothing, so they are not part of a fingerprint.
READ_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]
MODULES = "modules.json"
PICKLED_WEIGHTS = "pytorch_model*.bin"
SAFE_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
FOREIGN_FOLDERS = {"onnx", "openvino", ".git", ".cache"}
# The largest headers seen are below 1 MB; parsed, 10 MB of JSON take 10 times as much memory.
MAX_HEADER_BYTES = 10_000_000

Hash = Callable[[Path], str]
"""A file -> its sha256."""


def find_model(name: str, *, revision: str | None, root: Path, address: str) -> Path:
    """The folder a model's name means.

    Args:
        name: `package:<module>/<path>`, a folder (relative to `root`), or a name on the hub, which is
            looked up in the local cache first and fetched unless HF_HUB_OFFLINE is set.
        revision: Of a hub name: branch, tag or commit; None for its default branch.
        root: What relative folders start from.
        address: The setting to name in an error, such as `embed.teacher`.

    Raises:
        MissingError: it is not on this machine and cannot be fetched, or it stands for imported vectors.
    """
    if name.startswith(IMPORTED):
        raise MissingError(
            address,
            f"{shown(name)} stands for imported vectors, and these cannot read texts",
            "name a model there, or do it with a student",
        )
    if name.startswith(PACKAGE):
        return _package_folder(name.removeprefix(PACKAGE), address)
    folder = located(name, root, address)
    if folder.is_dir():
        return folder.resolve()
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise MissingError(
            address, f"no folder {shown(name)}", "put the model there, or mend the path"
        )
    return _hub_folder(name, revision, address)


def _package_folder(name: str, address: str) -> Path:
    module, _, inside = name.partition("/")
    try:
        # The parent of a dotted name would be imported by find_spec, so only top-level names are taken.
        spec = importlib.util.find_spec(module) if "." not in module else None
    except ValueError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise MissingError(
            address,
            f"no package {shown(module)} is installed",
            "install the package that carries the model (the demo's is in the extra `demo`)",
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / inside
    if not folder.is_dir():
        raise MissingError(address, f"the package has no folder {shown(inside)}", "mend the path")
    return folder


def _hub_folder(name: str, revision: str | None, address: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def fetch(*, local: bool) -> Path:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=READ_PATTERNS, local_files_only=local
            )
        )

    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}
    try:
        try:
            return fetch(local=True)
        except LocalEntryNotFoundError:
            if offline:
                raise
            return fetch(local=False)
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        why = "HF_HUB_OFFLINE is set" if offline else shown(error)
        raise MissingError(
            address,
            f"{shown(name)} is no folder here, not in the local hub cache, and cannot be fetched ({why})",
            "give the path of a folder that has the model, or fetch it where the hub can be reached",
        ) from None


def model_files(folder: Path, *, address: str) -> list[Path]:
    """The files of a model that its loader reads, sorted by name.

    Raises:
        TeachonceError: no configuration, no safetensors, or weights that were cut off.
    """
    files = sorted(
        path
        for pattern in READ_PATTERNS
        for path in folder.rglob(pattern)
        if path.is_file() and not FOREIGN_FOLDERS & set(path.relative_to(folder).parts)
    )
    if not {"config.json", MODULES} & {path.name for path in files if path.parent == folder}:
        raise TeachonceError(
            address,
            f"{folder} has neither config.json nor modules.json",
            "name the folder of a model",
        )
    if (folder / "adapter_config.json").exists():
        raise TeachonceError(
            address,
            f"{folder} is an adapter, half a model",
            "merge it into its base model and save that",
        )
    weights = [path for path in files if path.suffix == ".safetensors"]
    if not weights:
        raise TeachonceError(
            address,
            f"{folder} has no *.safetensors",
            "save the model again with safetensors: pickled weights can run code, so they are not read",
        )
    _check_modules(folder, address)
    for path in weights:
        _check_safetensors(path, address)
    return files


def _check_modules(folder: Path, address: str) -> None:
    """Raise for a module that is not in the folder, or has nothing but pickled weights.

    Modules, such as a dense layer after pooling, stand in modules.json with their folders.
    """
    if (folder / MODULES).is_file():
        for path in _module_paths(folder / MODULES, address):
            if not (folder / path).resolve().is_relative_to(folder.resolve()):
                raise TeachonceError(
                    address,
                    f"{folder / MODULES} names a module outside of its folder: {shown(repr(path))}",
                    "save the model again, all of it in one folder",
                )
    for weights in sorted(folder.rglob(PICKLED_WEIGHTS)):
        inside = FOREIGN_FOLDERS.isdisjoint(weights.relative_to(folder).parts)
        if inside and not any((weights.parent / name).is_file() for name in SAFE_WEIGHTS):
            raise TeachonceError(
                address,
                f"{weights} has no {SAFE_WEIGHTS[0]} beside it",
                "save the model again with safetensors: pickled weights can run code, so they are not read",
            )


def _module_paths(file: Path, address: str) -> list[str]:
    try:
        modules = json.loads(file.read_bytes())
        return [str(module.get("path", "")) for module in modules]
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise TeachonceError(
            address, f"{file} is no list of modules ({shown(error)})", "fetch the file again"
        ) from None


def _check_safetensors(path: Path, address: str) -> None:
    """Raise unless the header parses and the file is as long as it says: catches a cut download."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER_BYTES + 1
        try:
            if length > min(size, MAX_HEADER_BYTES):
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name[:2] != "__"]
            if 8 + length + max(ends, default=0) != size:
                raise ValueError(f"{size} bytes, {8 + length + max(ends, default=0)} expected")
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise TeachonceError(
                address,
                f"{path} is no whole safetensors file ({shown(error)})",
                "fetch the file again",
            ) from None


def file_hashes(folder: Path, *, address: str, sha256: Hash) -> dict[str, str]:
    """Name within the folder -> sha256, for each file that the loader reads."""
    return {
        path.relative_to(folder).as_posix(): sha256(path)
        for path in model_files(folder, address=address)
    }


def sha256_of(path: Path) -> str:
    """The sha256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_bytes(folder: Path) -> int:
    """Bytes of a model's weights on disk."""
    return sum(
        path.stat().st_size
        for path in folder.rglob("*.safetensors")
        if not FOREIGN_FOLDERS & set(path.relative_to(folder).parts)
    )
