"""`python -m easyinv_edit` is the command line."""

from easyinv_edit.cli import main

main()
