"""Speed questions, one file each, over one harness: ``python -m bench [name ...] [--smoke]``. See README.md."""
