"""Write the real tweets that Veneer can fetch as text-to-label rows: `python make_data.py FOLDER`."""

import json
import random
import sys
from pathlib import Path

from veneer.recipes.ratings import read_ratings

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
rows = [
    {"prompt": f"Tweet text : {' '.join(row['text'].split())} Label :", "completion": f" {row['label']}"}
    for row in read_ratings("tweet-sentiment")
]
random.Random(0).shuffle(rows)
for name, part in (("test", rows[:100]), ("train", rows[100:1100])):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part), "utf-8")
    print(f"{path}: {len(part)} tweets")
