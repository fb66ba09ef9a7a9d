"""`python -m dreslcl`, and `torchrun ... -m dreslcl`."""

from .cli import main

main()
