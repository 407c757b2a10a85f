"""The door for Python: open a project, and read by row id what its stages left.

It re-exports; nothing else lives here. It is the top of the house: no other package imports it.

Examples:
    >>> import teachonce
    >>> project = teachonce.open("path/to/project")
    >>> project.texts[5]
    'Ember garden needle oyster.'
    >>> project.vectors[[5, 9]].shape
    (2, 384)
"""

from pipeline.by_row import NeighbourLists, Neighbours, Roles, Texts, Vectors
from pipeline.project import Project, TeacherModel, open
from storage.errors import (
    AnotherCopyError,
    DamagedError,
    MissingError,
    RowError,
    StorageError,
    TeachonceError,
)

__all__ = [
    "AnotherCopyError",
    "DamagedError",
    "MissingError",
    "NeighbourLists",
    "Neighbours",
    "Project",
    "Roles",
    "RowError",
    "StorageError",
    "TeacherModel",
    "TeachonceError",
    "Texts",
    "Vectors",
    "open",
]
