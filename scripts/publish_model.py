"""Publish a model on the Hub: weights, tokenizer, card and report, private unless asked otherwise.

    python scripts/publish_model.py runs/mine --repo-id me/small --dry-run    # build everything, list it, send nothing
    python scripts/publish_model.py runs/mine --repo-id me/small

The folder is what `hf-compress run` or `save_pretrained` wrote. The same as `hf-compress publish`.
"""

import sys

from hf_compress.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["publish", *sys.argv[1:]]))
