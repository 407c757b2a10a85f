"""Resolve the name of a model to a folder, and hash the files that its loader reads.

Imports no torch: `check` examines models in a fraction of a second, and a fingerprint needs bytes only.
Weights are read as safetensors only; a pickle is refused, not converted.

This file is long because loaders read many files under many names, and a hash must miss none of them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import struct
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from functools import partial
from pathlib import Path, PurePosixPath

from stages.params import API, IMPORTED
from stages.reading.files import is_regular, located
from storage import regular
from storage.errors import MissingError, TeachonceError, shown

PACKAGE = "package:"

# What transformers and sentence-transformers read of a folder. Other formats of the same weights
# (onnx/, *.bin), cards and training leftovers change nothing, so they are not part of a fingerprint.
READ_PATTERNS = [
    *("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"),
    *("*.codes", "*.spm", "*.tiktoken", "*.tokenizer"),  # of PhoBERT, Marian, Qwen, ProphetNet
]
MODULES = "modules.json"
TOKENIZER = "tokenizer.json"
PICKLED_WEIGHTS = "pytorch_model*.bin"
SAFE_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
TRANSFORMER = "Transformer"
# Names of files that a tokenizer may be made of; a tokenizer without a vocabulary has its settings alone.
VOCABULARY = r"token|vocab|\.model$|\.spm$|merges|\.py$"
# Kinds of modules that cannot be loaded without a file of theirs; a Normalize, say, has none.
WITH_FILES = {
    *(TRANSFORMER, "Pooling", "Dense", "LayerNorm", "WeightedLayerPooling", "Router", "Asym"),
    *("StaticEmbedding", "WordEmbeddings", "WordWeights", "BoW", "CNN", "LSTM", "CLIPModel"),
}
ROUTERS = {"Router", "Asym"}
# What other forms of the weights, training, evaluation and cards leave beside a model. data_config.json is
# of that sort, too, but fingerprints of many models have it.
FOREIGN_FOLDERS = (
    *("onnx", "openvino", ".*", "__pycache__", "eval", "checkpoint-*", "runs", "logs"),
    *("wandb", "mlruns", "tensorboard", "global_step*"),
)
FOREIGN_FILES = (
    *("trainer_state.json", "training_args.json", "*_results.json", "requirements*.txt"),
    *("readme*", "license*", "licence*", "notice*"),
)
# Other forms of the weights, cards, pictures, archives: code of a model's maker may read anything else.
_FOREIGN_ENDINGS = """
    .bin .h5 .msgpack .ot .onnx .onnx_data .pt .pth .ckpt .gguf .tflite .pb .mlmodel .mlpackage
    .pkl .pickle .joblib .md .rst .pdf .html .ipynb .png .jpg .jpeg .gif .svg .webp .mp4 .zip
    .gz .tar .zst .log .csv .tsv .jsonl .parquet .arrow .pyc .sh .lock .tmp
"""
FOREIGN_ENDINGS = tuple(_FOREIGN_ENDINGS.split())
TRAIN_SCRIPT = "train_script.py"
# transformers reads one folder more than that of a module.
TEMPLATES = "additional_chat_templates"
# Of a header, an index or a configuration: the largest seen are below that. Parsed, JSON takes 10 times as
# much memory.
MAX_JSON_BYTES = 10_000_000

Hash = Callable[[Path], str]
"""A file -> its sha256."""


def find_model(
    name: str, *, revision: str | None, root: Path, address: str, pooling: str | None = None
) -> Path:
    """Returns the folder that a model's name means.

    Args:
        name: `package:<module>/<path>`, a folder (relative to `root`), or a name on the hub, which is
            looked up in the local cache first and fetched unless HF_HUB_OFFLINE is set.
        revision: Branch, tag or commit of a hub model; None for its default branch.
        root: Folder that relative names start from.
        address: The setting to name in an error, such as `embed.teacher`.
        pooling: Pooling in the settings; with it a hub's model may lack modules.json. None for none.

    Raises:
        MissingError: it is not, or not as a whole, on this machine and cannot be fetched, or it stands for
            imported vectors or a model behind an API.
    """
    if name.startswith(IMPORTED):
        raise MissingError(
            address,
            f"{shown(name)} stands for imported vectors, and these cannot read texts",
            "name a model there, or do it with a student",
        )
    if name.startswith(API):
        raise MissingError(
            address,
            f"{shown(name)} stands for a model behind an API, which has no folder",
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
    return _hub_folder(name, revision, address, pooling)


def find_tokenizer(name: str, *, root: Path, address: str) -> Path:
    """Returns the tokenizer.json of a model, named as `find_model` takes it; no other file is needed.

    Raises:
        MissingError: it is not on this machine and cannot be fetched.
    """
    if name.startswith(PACKAGE):
        folder = _package_folder(name.removeprefix(PACKAGE), address)
    else:
        folder = located(name, root, address)
    if folder.is_dir() or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        if (folder / TOKENIZER).is_file():
            return folder / TOKENIZER
        raise MissingError(
            address,
            f"no {TOKENIZER} in {shown(name)}",
            "name a folder or a model of the hub with one",
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(name, TOKENIZER))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise MissingError(
            address,
            f"the {TOKENIZER} of {shown(name)} is not in the local hub cache, and cannot be fetched "
            f"({shown(error)})",
            "name a folder that has it, or fetch it where the hub can be reached",
        ) from None


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


def _hub_folder(name: str, revision: str | None, address: str, pooling: str | None) -> Path:
    """Returns the snapshot of a model in the hub's cache, completed if the hub can be reached.

    A snapshot may be incomplete: other programs fetch single files, such as weights without modules.json,
    and a download may have been interrupted.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def fetch(*, local: bool) -> Path:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=READ_PATTERNS, local_files_only=local
            )
        )

    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}
    part: Path | None = None
    try:
        try:
            part = fetch(local=True)
            if not lacking(part):
                return part
        except LocalEntryNotFoundError:
            pass
        if not offline:
            # What is still missing then, the hub has not got: `model_files` and the loader say so.
            return fetch(local=False)
        why = "HF_HUB_OFFLINE is set"
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        why = "HF_HUB_OFFLINE is set" if offline else shown(error)
    if part is None:
        raise MissingError(
            address,
            f"{shown(name)} is no folder here, not, or not as a whole, in the local hub cache, and cannot "
            f"be fetched ({why})",
            "give the path of a folder that has the model, or fetch it where the hub can be reached",
        )
    missing = lacking(part)
    if missing == [MODULES] and pooling is not None:
        return part
    setting = f"{address.rpartition('.')[0]}.pooling"
    or_say = f", or set {setting} to what its authors say" if missing == [MODULES] else ""
    at = "" if revision is None else f" --revision {shown(revision)}"
    raise MissingError(
        address,
        f"{shown(name)} is in the local hub cache in part: {', '.join(missing)} missing, and it cannot be "
        f"fetched ({why})",
        f"run `hf download {shown(name)}{at}` where the hub can be reached{or_say}",
    )


def lacking(folder: Path) -> list[str]:
    """Returns the names of files and folders that a complete model has and this folder lacks.

    A folder without modules.json is complete for transformers, but here the pooling must be known.
    """
    missing: list[str] = []
    paths = [""]
    if (folder / MODULES).is_file():
        modules = modules_of(folder, str(folder))
        missing += [f"{path}/" for kind, path in modules if path and _is_empty(folder / path, kind)]
        paths += [path for _, path in modules]
    else:
        modules = [(TRANSFORMER, "")]
        missing.append(MODULES)
    # Without a vocabulary, transformers reads every word as unknown, without a word about it.
    missing += [
        f"{path}/tokenizer.json".lstrip("/")
        for kind, path in modules
        if kind == TRANSFORMER and (folder / path).is_dir() and not _has_tokenizer(folder / path)
    ]
    for index in sorted({folder / path / SAFE_WEIGHTS[1] for path in paths}):
        if index.is_file():
            missing += [
                (index.parent / name).relative_to(folder).as_posix()
                for name in _shards(index, str(folder))
                if not (index.parent / name).is_file()
            ]
    weights = _own_files(folder, "*.safetensors", address=str(folder), trust_remote_code=True)
    if not any(path.is_file() for path in weights):
        missing.append(SAFE_WEIGHTS[0])
    return missing


def _is_empty(folder: Path, kind: str) -> bool:
    """Whether the files that a module needs are missing."""
    return kind in WITH_FILES and not any(path.is_file() for path in folder.rglob("*"))


def _has_tokenizer(folder: Path) -> bool:
    return any(
        path.is_file() and re.search(VOCABULARY, path.name) is not None for path in folder.iterdir()
    )


def _shards(index: Path, address: str) -> list[str]:
    """Returns the files that an index of weights names."""
    try:
        return sorted(
            {
                str(name)
                for name in json.loads(regular.content(index, MAX_JSON_BYTES))[
                    "weight_map"
                ].values()
            }
        )
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise TeachonceError(
            address, f"{index} is no index of weights ({shown(error)})", "fetch the file again"
        ) from None


def model_files(folder: Path, *, address: str, trust_remote_code: bool = False) -> list[Path]:
    """Returns the files of a model that its loader reads, sorted by name.

    Args:
        folder: Folder of the model.
        address: Name of the setting in errors.
        trust_remote_code: Whether code in the folder may run: it may read any file there.

    Raises:
        TeachonceError: the configuration or safetensors are missing, or weights are truncated.
    """
    own = partial(_own_files, folder, address=address, trust_remote_code=trust_remote_code)
    files = [path for path in own(*READ_PATTERNS) if is_regular(path, address)]
    if trust_remote_code:
        others = [path for path in own("*") if not path.is_dir() and _may_be_read(path)]
        files = sorted({*files, *(path for path in others if is_regular(path, address))})
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
    _check_modules(folder, address, trust_remote_code)
    for path in weights:
        read_header(path, address)
    return files


def _may_be_read(path: Path) -> bool:
    """Whether the maker's code may read a file: any file but known foreign ones."""
    name = path.name.lower()
    named = name in {"dockerfile", "makefile", "citation.cff"}
    return not (named or name.startswith(".") or name.endswith(FOREIGN_ENDINGS))


def _own_files(folder: Path, *patterns: str, address: str, trust_remote_code: bool) -> list[Path]:
    """Returns the files with these names that belong to the model, sorted by name."""
    own = _is_own(folder, address, trust_remote_code)
    return sorted(
        path
        for pattern in patterns
        for path in folder.rglob(pattern)
        if own(path.relative_to(folder).as_posix())
    )


def _is_own(folder: Path, address: str, trust_remote_code: bool) -> Callable[[str], bool]:
    """Name within the folder -> whether a loader may read it: at its top, or in a module's folder."""
    places = [PurePosixPath(path) for path in _module_folders(folder, address)]

    def is_own(name: str) -> bool:
        path = PurePosixPath(name)
        place = next((module for module in places if path.is_relative_to(module)), None)
        below = path if place is None else path.relative_to(place)
        folders = below.parts[:-1]
        if any(fnmatch(part, foreign) for part in folders for foreign in FOREIGN_FOLDERS):
            return False
        if any(fnmatch(path.name.lower(), foreign) for foreign in FOREIGN_FILES):
            return False
        if trust_remote_code:
            return True
        named = place is not None or not folders or folders == (TEMPLATES,)
        return named and path.name != TRAIN_SCRIPT

    return is_own


def _module_folders(folder: Path, address: str) -> list[str]:
    """Returns the folders that modules.json and configurations of routers name, inner ones first."""
    names = []
    for kind, path in modules_of(folder, address):
        names.append(path)
        for name in ("router_config.json", "config.json") if kind in ROUTERS else ():
            try:
                types = json.loads(regular.content(folder / path / name, MAX_JSON_BYTES))["types"]
                names += [(PurePosixPath(path) / str(module)).as_posix() for module in types]
            except (OSError, ValueError, TypeError, LookupError, RecursionError):
                continue  # `stages.models.config` says what is wrong with it
    return sorted({path for path in names if path not in {"", "."}}, reverse=True)


def is_same_model(
    folder: Path, files: Mapping[str, str], before: Mapping[str, str], *, trust_remote_code: bool
) -> bool:
    """Whether the hashes of `before` are those of `files` and of files that no loader reads.

    Older versions hashed such files, too; caches under those fingerprints stay valid.
    """
    own = _is_own(folder, str(folder), trust_remote_code)
    return all(
        files.get(name) == sha256 if name in files else not own(name)
        for name, sha256 in before.items()
    ) and set(files) <= set(before)


def _check_modules(folder: Path, address: str, trust_remote_code: bool) -> None:
    """Raise for a module that is not in the folder, or has nothing but pickled weights.

    Modules, such as a dense layer after pooling, stand in modules.json with their folders.
    """
    for _, path in modules_of(folder, address):
        if not (folder / path).resolve().is_relative_to(folder.resolve()):
            raise TeachonceError(
                address,
                f"{folder / MODULES} names a module outside of its folder: {shown(repr(path))}",
                "save the model again, all of it in one folder",
            )
    pickled = _own_files(
        folder, PICKLED_WEIGHTS, address=address, trust_remote_code=trust_remote_code
    )
    for weights in pickled:
        if not any((weights.parent / name).is_file() for name in SAFE_WEIGHTS):
            raise TeachonceError(
                address,
                f"{weights} has no {SAFE_WEIGHTS[0]} beside it",
                "save the model again with safetensors: pickled weights can run code, so they are not read",
            )
    missing = [name for name in lacking(folder) if name != MODULES]
    if missing:
        raise TeachonceError(
            address,
            f"{folder} is a part of a model: {', '.join(missing)} missing",
            "copy or fetch the whole folder again",
        )


def modules_of(folder: Path, address: str) -> list[tuple[str, str]]:
    """Returns kind and path of each module, as ("Pooling", "1_Pooling"); empty without modules.json."""
    file = folder / MODULES
    if not file.is_file():
        return []
    try:
        modules = json.loads(regular.content(file, MAX_JSON_BYTES))
        return [
            (str(module.get("type", "")).rpartition(".")[2], str(module.get("path", "")))
            for module in modules
        ]
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise TeachonceError(
            address, f"{file} is no list of modules ({shown(error)})", "fetch the file again"
        ) from None


def read_header(path: Path, address: str) -> dict[str, tuple[int, ...]]:
    """Returns tensor -> shape, from the header of a file of weights.

    Raises:
        TeachonceError: the header is malformed, or the file is truncated.
    """
    with regular.opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_JSON_BYTES + 1
        try:
            if length > min(size, MAX_JSON_BYTES):
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(length))
            tensors = {name: entry for name, entry in header.items() if name[:2] != "__"}
            end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
            if 8 + length + end != size:
                raise ValueError(f"{size} bytes, {8 + length + end} expected")
            return {name: tuple(entry["shape"]) for name, entry in tensors.items()}
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise TeachonceError(
                address,
                f"{path} is no whole safetensors file ({shown(error)})",
                "fetch the file again",
            ) from None


def file_hashes(
    folder: Path, *, address: str, sha256: Hash, trust_remote_code: bool = False
) -> dict[str, str]:
    """Returns name within the folder -> sha256, for each file that the loader reads."""
    files = model_files(folder, address=address, trust_remote_code=trust_remote_code)
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


def sha256_of(path: Path) -> str:
    """Returns the sha256 of a file, as hex."""
    with regular.opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_bytes(folder: Path, *, trust_remote_code: bool = False) -> int:
    """Returns the bytes of a model's weights on disk."""
    weights = _own_files(
        folder, "*.safetensors", address=str(folder), trust_remote_code=trust_remote_code
    )
    return sum(path.stat().st_size for path in weights)
