"""Files: finding them, reading tensors out of them safely, writing them whole or not at all."""

from regraft.files.atomic import atomic_file, atomic_folder
from regraft.files.locate import Located, locate
from regraft.files.pickle_gate import allow_pickles
from regraft.files.tensorfile import TensorFile, TensorInfo
from regraft.files.tensorwriter import data_sha256, serialize

__all__ = [
    "Located",
    "TensorFile",
    "TensorInfo",
    "allow_pickles",
    "atomic_file",
    "atomic_folder",
    "data_sha256",
    "locate",
    "serialize",
]
