"""A plain Python collection of source files: our `coordinator collect` is compared with it.

    peer_collect.py CHECKOUT OUT [--grow]

It walks a checkout, leaves files out by their last letters and by parts of their paths, reads them as UTF-8, takes the
code cells of notebooks, and writes Feather chunks of 10,000 rows, as the Personal Copilot scripts of Hugging Face do
with pandas; but it writes the last chunk as well, and gathers rows in a list. With `--grow` it gathers them as the
scripts do: a frame for each row, joined to the ones before.
Prints a JSON object with the number of rows.
"""

import json
import os
import sys

import pandas

EXCLUDED = tuple(
    "png jpg jpeg gif mp4 jfif key PDF pdf docx xlsx pptx flac ogg mid webm wav mp3 jar aar gz zip bz2 npy index inv "
    "DS_Store rdb pack idx glb gltf len otf unitypackage ttf xz pcm opus".split()
)
EXCLUDED_PARTS = (".git", "__pycache__", "xcodeproj")
CHUNK_ROWS = 10_000


def notebook_code(text):
    cells = (cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")
    sources = ("".join(cell["source"]) for cell in cells)
    return "".join(source for source in sources if not source.startswith("!") and "%%capture" not in source)


def main():
    checkout, out, *options = sys.argv[1:]
    grow = "--grow" in options
    frame = pandas.DataFrame()
    os.makedirs(out, exist_ok=True)
    rows, chunks, total = [], 0, 0

    def write():
        nonlocal chunks, total, frame
        table = frame.reset_index() if grow else pandas.DataFrame(rows)
        table.to_feather(os.path.join(out, f"df_chunk_{chunks}_{len(rows)}.ftr"))
        frame = pandas.DataFrame()
        chunks, total = chunks + 1, total + len(rows)
        rows.clear()

    for directory, _, names in os.walk(checkout):
        for name in names:
            path = os.path.join(directory, name)
            if path.endswith(EXCLUDED) or any(part in path for part in EXCLUDED_PARTS) or os.path.islink(path):
                continue
            try:
                with open(path, encoding="utf-8") as file:
                    content = file.read()
                if path.endswith("ipynb"):
                    content = notebook_code(content)
            except Exception:
                content = ""
            if content:
                row = {"repo_id": os.path.dirname(directory), "file_path": path, "content": content}
                rows.append(row)
                if grow:
                    frame = pandas.concat([frame, pandas.DataFrame([row])])
            if len(rows) == CHUNK_ROWS:
                write()
    if rows:
        write()
    print(json.dumps({"rows": total}))


main()
