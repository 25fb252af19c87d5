"""Pushes a directory as huggingface_hub does it; the hub and the token are those of HF_ENDPOINT and HF_TOKEN.

    push_reference.py DIR OWNER/NAME
"""

import os
import sys

os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


def main():
    from huggingface_hub import HfApi

    directory, repo = sys.argv[1:]
    api = HfApi()
    api.create_repo(repo, private=True, exist_ok=True)
    print(api.upload_folder(repo_id=repo, folder_path=directory, commit_message="Upload with huggingface_hub").oid)


if __name__ == "__main__":
    main()
