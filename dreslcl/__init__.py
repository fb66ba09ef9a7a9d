"""dreslcl: slide representations learnt from whole-slide images and their pathology reports.

Public names stand in `__init__.pyi`. They resolve on first use, so that `import dreslcl` loads neither torch nor OpenCLIP.
"""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
__version__ = "0.1.0"
