"""The few errors a user can act on.

A message says where, what was asked, what is there and what to do, in one line; the command line prints it and exits.
Anything else that is raised is a bug and stays a traceback.
"""


class DreslclError(Exception):
    """A mistake or a fault that the user can mend. Base of all errors below."""


class ConfigError(DreslclError):
    """A setting has a value that makes no sense."""


class SlideError(DreslclError):
    """A scan cannot be opened, or not be read as asked."""


class TableError(DreslclError):
    """A table (reports, labels, slides.csv) lacks a column, holds bad ids, or cannot be read."""


class StoreError(DreslclError):
    """A file that dreslcl wrote is missing, damaged, or was made with other settings than asked for now."""


class DiskError(DreslclError):
    """Results cannot be written: the disk is full or read-only, or permissions forbid it."""


class ModelError(DreslclError):
    """An encoder or a model cannot be built, downloaded or loaded."""


class BusyError(DreslclError):
    """Another process holds the folder."""


def reason(error: Exception) -> str:
    """Why a slide failed, in one line."""
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror or error})"
    return " ".join(str(error).split()) or "not enough memory"
