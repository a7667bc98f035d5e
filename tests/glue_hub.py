"""A Hub with one dataset: what `load_dataset` and `hf download` ask of it, on a port of this machine.

Start it with a folder in the Hub's layout, TASK/SPLIT*.parquet, and point a process at it with `environment`:

    with GlueHub(folder) as hub:
        subprocess.run(command, env=os.environ | hub.environment(cache_dir))
"""

import re
from pathlib import Path

from tests.hub_server import Hub, hub_environment

__all__ = ["GlueHub", "hub_environment"]
REPOSITORY = "nyu-mll/glue"
SPLIT_NAME = re.compile(r"-\d{5}-of-\d{5}$")


class GlueHub(Hub):
    """Serves `folder` as the dataset nyu-mll/glue. `requests` collects what was asked: (method, path).

    One revision, which is a hash of the files: it is taken when the server is made.
    """

    def __init__(self, folder):
        super().__init__(tokens={})
        repo = f"datasets/{REPOSITORY}"
        files = self.add(repo, folder).at().files
        self.add(repo, files | {"README.md": card(files)})

    @property
    def requests(self):
        return [(method, path) for method, path, *_ in super().requests]


def card(files):
    """The README.md whose head says which files make which split of which configuration."""
    splits = {}
    for name in files:
        task, _, file = name.rpartition("/")
        splits.setdefault(task, set()).add(SPLIT_NAME.sub("", Path(file).stem))
    lines = ["---", "configs:"]
    for task in sorted(splits):
        lines += [f"- config_name: {task}", "  data_files:"]
        for split in sorted(splits[task]):
            lines += [f"  - split: {split}", f"    path: {task}/{split}[-.]*"]
    return "\n".join([*lines, "---", "# Made-up rows", ""])
